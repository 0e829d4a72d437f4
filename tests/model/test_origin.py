"""An adapter knows the base model it was trained on: one of the same shapes and other weights is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import save_adapter, tiny_model, tiny_mote
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_mote.generation import load_mote
from axolotl_mote.model.origin import check_origin, sample_weights

MARKERS = (259, 260, 261, 262, 263, 264)
REFUSAL = r"base_model must be the one that the adapter was trained on, .+; got one that differs in \d+ of \d+ sampled"


def check(sample: dict[str, list[float]], model: Any, markers: Any = MARKERS, **options: Any) -> None:
    check_origin(model, sample, "BASE", markers, **options)


def other_seed() -> Any:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.roll(1))
    return model


def finetuned(model: Any, share: float = 0.01) -> Any:
    """Every weight moved by about one per cent, as full fine-tuning does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + share * torch.randn_like(parameter))
    return model


def merged(model: Any) -> Any:
    """Only the linear layers changed, as by a merged LoRA; embedding and norms are the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("origin")
    tiny_model().save_pretrained(path / "base")
    model, tokenizer = tiny_mote()
    return save_adapter(model, tokenizer, path / "adapter", path / "base")


@pytest.mark.parametrize("change", [other_seed, lambda: finetuned(tiny_model()), lambda: merged(tiny_model())])
def test_other_weights_of_the_same_shape_are_refused(adapter: Path, change: Callable[[], Any], tmp_path: Path) -> None:
    change().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=REFUSAL):
        load_mote(adapter, tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=REFUSAL):
        PeftModel.from_pretrained(other, str(adapter))
    first = PeftModel.from_pretrained(tiny_model(), str(adapter))  # its own base
    config = type(first.peft_config["default"]).from_pretrained(adapter)
    config.base_sample = {name: [-x for x in values] for name, values in config.base_sample.items()}
    with pytest.raises(ValueError, match=REFUSAL):  # a second one, trained on something else
        first.add_adapter("second", config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_weights_in_another_type_are_taken(dtype: torch.dtype) -> None:
    sample = sample_weights(tiny_model(), MARKERS)
    assert len(sample) == 8
    assert {4, 8} == {len(values) for values in sample.values()}  # 4 of a matrix with 16 rows
    assert "model.embed_tokens.weight" in sample
    check(sample, tiny_model().to(dtype))
    check(sample, tiny_model().to(dtype).float())
    check(sample_weights(tiny_model().to(dtype), MARKERS), tiny_model())


def test_an_adapter_on_top_and_a_longer_table_do_not_matter(adapter: Path) -> None:
    sample = json.loads((adapter / "adapter_config.json").read_text())["base_sample"]
    model = PeftModel.from_pretrained(tiny_model(), str(adapter))
    check(sample, model.get_base_model())
    longer = tiny_model()
    longer.resize_token_embeddings(400, mean_resizing=False)
    check(sample, longer)


def test_rows_of_markers_do_not_count() -> None:
    """A served base has the marker rows in its table, which may stand anywhere."""
    markers = (0, 5, 8, 12, 20, 32)
    sample = sample_weights(tiny_model(), markers)
    served = tiny_model()
    with torch.no_grad():
        served.get_input_embeddings().weight[list(markers)] = 7.0
    check(sample, served, markers)
    with torch.no_grad():
        served.get_input_embeddings().weight[:40] = 7.0
    with pytest.raises(ValueError, match=REFUSAL):
        check(sample, served, markers)


def test_quantized_matrices_and_those_without_values_do_not_count() -> None:
    sample = sample_weights(tiny_model(), MARKERS)
    quantized = other_seed()
    layers = [layer for layer in quantized.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False)
    quantized.get_input_embeddings().weight.data.copy_(tiny_model().get_input_embeddings().weight)
    check(sample, quantized)
    check(sample, other_seed().to("meta"))
    check({}, other_seed())  # an adapter from before there were samples


def test_bits_that_are_stored_as_bfloat16_are_no_weights() -> None:
    """As training quantizes a base to 4 bits; the adapter of such a run fits the base in full precision, and back."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model()
    for layer in [layer for name, layer in model.named_modules() if name.endswith("_proj")]:
        packed = torch.randn(layer.weight.numel() // 4, 1).to(torch.bfloat16)
        layer.weight = bitsandbytes.nn.Params4bit(packed, requires_grad=False, bnb_quantized=True)
    sample = sample_weights(model, MARKERS)
    assert set(sample) == {"model.embed_tokens.weight"}
    check(sample, tiny_model())
    check(sample_weights(tiny_model(), MARKERS), model)


@pytest.mark.parametrize("seed", range(20))
def test_two_roundings_in_a_row_are_no_difference(seed: int) -> None:
    """A float32 base that was trained in float16, loaded in bfloat16, and the other ways round."""
    torch.manual_seed(seed)
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn_like(parameter))
    forms = [copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    for one in forms:
        for other in forms:
            check(sample_weights(one, MARKERS), other)


def test_a_partitioned_parameter_is_gathered() -> None:
    """As under ZeRO-3: the parameter is empty, but inside the context manager."""
    model, whole = tiny_model(), {}
    for name, parameter in model.named_parameters():
        whole[id(parameter)] = (name, parameter.data)
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    read = []

    @contextmanager
    def gathered(parameter: Any) -> Any:
        name, parameter.data = whole[id(parameter)]
        read.append(name)
        yield
        parameter.data = torch.empty(0)

    assert sample_weights(model, MARKERS) == {}
    sample = sample_weights(model, MARKERS, gathered)
    assert sample == sample_weights(tiny_model(), MARKERS)
    assert len(read) == 8  # no more than what is sampled
    check(sample, model, gathered=gathered)
    with pytest.raises(ValueError, match=REFUSAL):
        check({name: [-x for x in values] for name, values in sample.items()}, model, gathered=gathered)
