"""What users combine with `adapter: mote`, looked at from inside; tests/e2e/test_options.py runs it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.dict import DictDefault
from kit import MARKER_IDS, base_model, chain, mote, mote_config
from torch import Tensor
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from axolotl_mote.model.adapter import add_mote_adapter
from axolotl_mote.training.plugin import MotePlugin
from axolotl_mote.training.trainer import MoteTrainer

LR = 1e-3
CHAINS = {"datasets": [{"path": "chains.jsonl", "type": "axolotl_mote.chain"}]}


def build(folder: Path, model: Any, **changes: Any) -> MoteTrainer:
    """A trainer as axolotl builds it."""
    optimizer = changes.pop("optimizer_cls_and_kwargs", None)
    arguments = AxolotlTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", include_tkps=False, learning_rate=LR, **changes
    )
    attributes = {"vocabulary": mote_config().vocabulary, "loss_weights": [1.0] * 4}
    kind = type("Trainer", (MoteTrainer,), attributes)
    return kind(model=model, args=arguments, optimizer_cls_and_kwargs=optimizer)


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss of a forward, by parameter name."""
    model.zero_grad()
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    model(input_ids=ids, targets=targets).loss.mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- NEFTune --------------------------------------------------------------------------------------------------------


def test_neftune_adds_the_noise_of_a_plain_embedding_to_every_token_while_training() -> None:
    model = mote().train()
    ids = torch.tensor([chain()])
    embedding = model.get_base_model().get_input_embeddings()
    without = embedding(ids)
    handle = activate_neftune(model, 5.0)
    plain = torch.nn.Embedding.from_pretrained(embedding.base_layer.weight.detach())
    plain_handle = activate_neftune(SimpleNamespace(get_input_embeddings=lambda: plain), 5.0)  # type: ignore[arg-type]
    torch.manual_seed(1)
    noise = embedding(ids) - without
    ordinary = ids.masked_fill(torch.isin(ids, torch.tensor(MARKER_IDS)), 0)
    torch.manual_seed(1)
    expected = plain(ordinary) - torch.nn.functional.embedding(ordinary, plain.weight)
    assert torch.allclose(noise, expected, atol=1e-6)
    markers = noise[torch.isin(ids, torch.tensor(MARKER_IDS))]
    assert len(markers) == 6
    assert (markers.abs().amax(-1) > 0).all()
    assert torch.equal(embedding.eval()(ids), without)
    deactivate_neftune(model, handle)
    plain_handle.remove()
    assert torch.equal(embedding.train()(ids), without)


def test_neftune_reaches_the_training_forward() -> None:
    model = mote(question_routing="mean").train()
    ids = torch.tensor([chain()])
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    before = model(input_ids=ids, targets=targets).loss
    handle = activate_neftune(model, 50.0)
    assert not torch.allclose(model(input_ids=ids, targets=targets).loss, before, atol=1e-2)
    deactivate_neftune(model, handle)
    assert torch.equal(model(input_ids=ids, targets=targets).loss, before)


# --- optimizers that look at names or shapes ------------------------------------------------------------------------


def learning_rates(made: MoteTrainer) -> dict[str, float]:
    """The learning rate of every trained parameter, by name."""
    rates = {id(p): group["lr"] for group in made.create_optimizer().param_groups for p in group["params"]}
    names = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    assert set(rates) == {id(p) for p in names.values()}
    return {name: rates[id(p)] for name, p in names.items()}


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_loraplus_gives_b_its_ratio_and_the_marker_rows_the_plain_rate(family: str, tmp_path: Path) -> None:
    rates = learning_rates(build(tmp_path, mote(family), loraplus_lr_ratio=16.0, loraplus_lr_embedding=1e-9))
    for name, rate in rates.items():
        assert rate == pytest.approx(16 * LR if "lora_B" in name else LR), name
    assert sum("lora_marker_rows" in name for name in rates) == (1 if family == "llama_tied" else 2)


@pytest.mark.parametrize("changes", [{"embedding_lr": 5e-4}, {"embedding_lr_scale": 0.5}])
def test_embedding_lr_is_that_of_the_marker_rows(changes: dict[str, float], tmp_path: Path) -> None:
    for name, rate in learning_rates(build(tmp_path, mote(), **changes)).items():
        assert rate == pytest.approx(5e-4 if "lora_marker_rows" in name else LR), name


def test_lr_groups_name_modules_of_the_decoder(tmp_path: Path) -> None:
    groups = [{"name": "output", "modules": ["o_proj"], "lr": 7e-4}]
    for name, rate in learning_rates(build(tmp_path, mote(), lr_groups=groups)).items():
        assert rate == pytest.approx(7e-4 if "o_proj" in name else LR), name


def test_muon_takes_the_experts_and_adam_the_marker_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    muon = pytest.importorskip("axolotl.contribs.mit.muon")
    module = __import__("axolotl.contribs.mit.muon.muon", fromlist=["muon"])
    eager = module.zeropower_via_newtonschulz5.__wrapped__  # compiling it takes 10 s
    monkeypatch.setattr(module, "zeropower_via_newtonschulz5", eager)
    model = mote(question_routing="shared").train()
    factory = (muon.MuonOptimizerFactory, {"lr": LR, "weight_decay": 0.0})
    made = build(tmp_path, model, optimizer_cls_and_kwargs=factory)
    optimizer = made.create_optimizer()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert optimizer.state[parameter]["use_muon"] == ("lora_marker_rows" not in name), name
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    gradients(model, torch.tensor([chain(guidance=0)]))  # no token is routed to the expert of the guidance
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters() if p.requires_grad}
    for name, change in moved.items():
        if "lora_A" in name or "lora_B" in name:
            blocks = change.split(2, dim=0 if "lora_A" in name else 1)
            assert [bool(block.abs().max() > 0) for block in blocks] == [True, False, True, True], name


# --- offloaded activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gathered", [None, nullcontext])
def test_gradients_do_not_depend_on_where_activations_are_kept(gathered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors are replaced by copies, as axolotl's `activation_offloading` replaces them."""
    monkeypatch.setattr("axolotl_mote.model.loss._CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("axolotl_mote.model.loss.chunk_size", lambda vocab_size: 8)
    model = mote(question_routing="random").train()
    model.base_model.gathered = gathered
    model.base_model.routing.step_dropout = (0.5, 0.5)
    ids = torch.tensor([chain(seed=1), chain(seed=2)])
    expected = gradients(model, ids)
    stored = []

    def store(tensor: Tensor) -> Tensor:
        stored.append(tensor.shape)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        offloaded = gradients(model, ids)
    assert len(stored) > 20
    assert offloaded.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(offloaded[name], gradient), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="activations are offloaded from a GPU")
@pytest.mark.parametrize("mode", [True, "legacy"])
def test_offloaded_activations_give_the_same_gradients(mode: Any, tmp_path: Path) -> None:
    from axolotl.core.trainers.mixins.activation_checkpointing import get_lora_act_offloading_ctx_manager

    model = mote(question_routing="random").train().cuda()
    ids = torch.tensor([chain(seed=1), chain(seed=2)]).cuda()
    expected = gradients(model, ids)
    context = get_lora_act_offloading_ctx_manager(model, use_streams=mode != "legacy", min_offload_size=1)
    with context:
        offloaded = gradients(model, ids)
    for name, gradient in expected.items():
        torch.testing.assert_close(offloaded[name], gradient)


# --- training arguments and the trainer -----------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["mote", "lora"])
def test_evaluation_is_off_before_the_first_step_too(adapter: str) -> None:
    arguments = MotePlugin().get_training_args(DictDefault(CHAINS, adapter=adapter, eval_strategy="no"))
    assert arguments is not None
    assert arguments["eval_on_start"] is False
    for strategy in ("epoch", None):
        arguments = MotePlugin().get_training_args(DictDefault(CHAINS, adapter=adapter, eval_strategy=strategy))
        assert arguments is not None
        assert "eval_on_start" not in arguments


@pytest.mark.parametrize(
    ("accelerator", "world", "deepspeed", "expected"),
    [
        (False, "1", None, True),
        (False, None, None, True),
        (True, "1", None, False),
        (False, "2", None, False),
        (False, "1", "zero2.json", False),
    ],
)
def test_one_process_without_an_accelerator_uses_the_cpu(
    accelerator: bool, world: str | None, deepspeed: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setenv("WORLD_SIZE", world) if world else monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = MotePlugin().get_training_args(DictDefault(CHAINS, adapter="mote", deepspeed=deepspeed))
    assert arguments == ({"use_cpu": True} if expected else {})


def test_other_runs_keep_their_training_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cfg = DictDefault(adapter="lora", eval_strategy="no", datasets=[{"path": "a.jsonl", "type": "alpaca"}])
    assert MotePlugin().get_training_args(cfg) is None
    assert MotePlugin().add_callbacks_post_trainer(cfg, object()) == []


@pytest.mark.parametrize("mode", [True, "legacy", "disk"])
def test_activations_are_not_offloaded_from_the_cpu(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cfg = DictDefault(CHAINS, adapter="mote", activation_offloading=mode)
    with pytest.raises(ValueError, match=rf"activation_offloading must not be set on the CPU; got {mode!r}\. Remove"):
        MotePlugin().get_training_args(cfg)
    MotePlugin().get_training_args(DictDefault(CHAINS, adapter="mote", activation_offloading="hidden_states"))


def test_a_trainer_of_another_plugin_is_refused(tmp_path: Path) -> None:
    cfg = DictDefault(CHAINS, adapter="mote")
    assert MotePlugin().add_callbacks_post_trainer(cfg, build(tmp_path, mote())) == []
    other = AxolotlTrainer.__new__(AxolotlTrainer)
    with pytest.raises(ValueError, match=r"plugins must not replace the trainer .*; got AxolotlTrainer of"):
        MotePlugin().add_callbacks_post_trainer(cfg, other)


def test_a_hub_gets_the_adapters_files_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """axolotl pushes before it calls the plugin for the last time."""
    from transformers import trainer as transformers_trainer

    pushed: dict[str, str] = {}

    class Hub:
        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: str, **kwargs: Any) -> None:
            pushed.update({file.name: file.read_text("utf-8", "replace") for file in Path(folder_path).iterdir()})

    monkeypatch.setattr(transformers_trainer, "hf_api", Hub)
    made = build(tmp_path, add_mote_adapter(base_model(), mote_config()), push_to_hub=True, hub_model_id="me/mote")
    type(made).write_card = staticmethod(lambda: (tmp_path / "README.md").write_text("ours"))  # type: ignore[assignment]
    made.push_to_hub()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= pushed.keys()
    assert pushed["README.md"] == "ours"
