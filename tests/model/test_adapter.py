"""The gated LoRA against a per-token loop over separate LoRAs, its gradients, marker rows, saving and loading."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import FAMILIES, MARKER_IDS, VOCABULARY, base_model, chain, mote, mote_config, randomize
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache, Trainer, TrainingArguments

from axolotl_mote.chain.steps import markers
from axolotl_mote.model.adapter import MoteLinear, add_mote_adapter, mote_model
from axolotl_mote.model.compat import named_cache
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.markers import MarkerEmbedding
from axolotl_mote.model.routing import document_starts, step_ids_from_tokens


class SeparateLora(nn.Module):
    """A linear layer with one plain LoRA per expert, applied token by token: the textbook forward."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, config: dict, steps: torch.Tensor) -> None:
        super().__init__()
        r, self.linear, self.steps, self.config = config["r"], linear, steps, config
        count = len(config["steps"]) + 1
        self.experts = [(a[k * r : (k + 1) * r], b[:, k * r : (k + 1) * r]) for k in range(count)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x)
        s = self.config["lora_alpha"] / self.config["r"]
        w = self.config["expert_weight"]
        updates = [torch.nn.functional.linear(torch.nn.functional.linear(x, a), b) for a, b in self.experts]
        result = out.clone()
        for row in range(x.shape[0]):
            for t in range(x.shape[1]):
                k = int(self.steps[row, t])
                chosen = updates[k - 1][row, t] if k else torch.stack([u[row, t] for u in updates[:-1]]).mean(0)
                result[row, t] += s * w * chosen + s * (1 - w) * updates[-1][row, t]
        return result


def reference(base: nn.Module, folder: Path, ids: torch.Tensor, steps: torch.Tensor, **inputs: torch.Tensor):
    """Logits built from the saved file alone: separate LoRAs, and a table that truly holds the marker rows."""
    import json

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, module in list(base.named_modules()):
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" in tensors:
            parent, _, leaf = name.rpartition(".")
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            setattr(base.get_submodule(parent), leaf, SeparateLora(module, a, b, config, steps))
    rows = next(tensor for name, tensor in tensors.items() if "embed_tokens.lora_marker_rows" in name)
    base.resize_token_embeddings(max(config["marker_ids"]) + 1, mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[config["marker_ids"]] = rows
        head = [tensor for name, tensor in tensors.items() if "lm_head.lora_marker_rows" in name]
        if head:
            base.get_output_embeddings().weight[config["marker_ids"]] = head[0]
        return base(input_ids=ids, **inputs).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value, minus infinities left out."""
    keep = torch.isfinite(expected)
    return float((found[keep] - expected[keep]).abs().max() / expected[keep].abs().max())


@torch.no_grad()
def test_gated_forward_equals_separate_loras_on_a_real_model(smollm2_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    steps = ["analysis", "guidance", "response"]
    tokenizer.add_special_tokens({"additional_special_tokens": markers(steps)})
    config = MoteConfig(
        r=4,
        lora_alpha=8,
        steps=steps,
        marker_ids=tokenizer.convert_tokens_to_ids(markers(steps)),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = add_mote_adapter(AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32), config)
    randomize(model, 0.02)
    model.eval().save_pretrained(tmp_path)
    texts = [
        "How?<|analysis|>It is a question.<|/analysis|><|response|>Like this.<|/response|>",
        "Why is that so?<|analysis|>A<|/analysis|><|guidance|>Be kind.<|/guidance|><|response|>Because.<|/response|>",
    ]
    worst = {}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        step_ids = step_ids_from_tokens(batch["input_ids"], config)
        base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
        expected = reference(base, tmp_path, batch["input_ids"], step_ids, attention_mask=batch["attention_mask"])
        found = model(**batch).logits
        real = batch["attention_mask"].bool()
        worst[side] = relative(found[real], expected[real])
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ids = torch.tensor([rows[0] + rows[1]])
    positions = torch.tensor([[*range(len(rows[0])), *range(len(rows[1]))]])
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    step_ids = step_ids_from_tokens(ids, config, positions)
    worst["packed"] = relative(
        model(input_ids=ids, position_ids=positions).logits,
        reference(base, tmp_path, ids, step_ids, position_ids=positions),
    )
    print("largest relative error:", worst)
    assert max(worst.values()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gated_forward_equals_separate_loras(family: str, tmp_path: Path) -> None:
    model = mote(family)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([chain(), chain(7, 2, 3, 6, seed=3)])
    step_ids = step_ids_from_tokens(ids, mote_config())
    expected = reference(base_model(family), tmp_path, ids, step_ids)
    assert relative(model(input_ids=ids).logits, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_equals_saved(family: str, tmp_path: Path) -> None:
    model = mote(family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path).eval()
    ids = torch.tensor([chain()])
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert loaded.peft_config["default"].steps == mote_config().steps


@pytest.mark.parametrize(("family", "rows"), [("llama_tied", 1), ("llama", 2)])
def test_the_file_holds_loras_and_marker_rows_only(family: str, rows: int, tmp_path: Path) -> None:
    mote(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = [name.rsplit(".", 2)[1] for name in tensors]
    assert set(kinds) == {"lora_A", "lora_B", "lora_marker_rows"}
    assert kinds.count("lora_marker_rows") == rows
    assert all(tensor.shape == (6, 32) for name, tensor in tensors.items() if "marker_rows" in name)


def test_without_the_package_loading_fails_loudly(tmp_path: Path) -> None:
    mote().save_pretrained(tmp_path / "adapter")
    base_model().save_pretrained(tmp_path / "base")
    code = (
        "from transformers import AutoModelForCausalLM; from peft import PeftModel;"
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r}),"
        f"{str(tmp_path / 'adapter')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "MOTE" in done.stderr
    done = subprocess.run([sys.executable, "-c", "import axolotl_mote;" + code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def expert_gradients(model: PeftModel) -> list[float]:
    """Largest gradient of each expert's B over all layers; the last one is the shared expert's."""
    blocks = torch.zeros(4)
    for module in model.modules():
        if isinstance(module, MoteLinear):
            grad = module.lora_B["default"].weight.grad
            blocks = torch.maximum(blocks, grad.abs().amax(0).view(4, -1).amax(1))
    return blocks.tolist()


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("absent", [1, 2])
def test_absent_steps_get_exactly_zero_gradient(checkpointing: bool | None, absent: int) -> None:
    model = mote(question_routing="shared").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    sizes = [5, 4, 3, 6]
    sizes[absent] = 0
    ids = torch.tensor([chain(*sizes)])
    model(input_ids=ids).logits.nan_to_num(neginf=0).sum().backward()
    gradients = expert_gradients(model)
    assert gradients[absent - 1] == 0.0
    assert all(gradient > 0 for k, gradient in enumerate(gradients) if k != absent - 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    ids = torch.tensor([chain(), chain(seed=4)])
    gradients = []
    for checkpointing in (False, True):
        model = mote().train()
        tuner = mote_model(model)
        tuner.routing.step_dropout = (0.5, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids).logits[..., :VOCABULARY].sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 20
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_every_expert_is_used_in_every_forward() -> None:
    model = mote().train()
    model(input_ids=torch.tensor([chain(analysis=0, guidance=0)])).logits[..., :VOCABULARY].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_training_draws_one_step_for_the_question_and_evaluation_takes_the_mean() -> None:
    model = mote()
    routing = mote_model(model).routing
    ids = torch.tensor([chain(seed=seed) for seed in range(40)])
    model(input_ids=ids)
    mean = routing.gate[:, 0]
    assert (mean[:, :6] == mean[0, 0]).all()
    model.train()
    model(input_ids=ids)
    question = routing.gate[:, :5]
    assert (question == question[:, :1]).all()  # one draw per document
    chosen = question[:, 0, :6].view(40, 3, 2)[..., 0] > 0
    assert (chosen.sum(1) == 1).all()
    assert (chosen.sum(0) > 5).all()
    first = routing.gate.clone()
    model(input_ids=ids)
    assert torch.equal(routing.gate, first)  # same optimizer step, same draw
    routing.step = 1
    model(input_ids=ids)
    assert not torch.equal(routing.gate, first)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_last_position_of_a_prompt_copies_no_weights(family: str) -> None:
    model = mote(family).eval()
    given = []
    model.get_output_embeddings().base_layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([chain(), chain(seed=1)]), logits_to_keep=1)
    assert [hidden.shape[:2] for hidden in given] == [(2, 1)]
    assert given[0].is_contiguous()  # of a strided view F.linear makes a batch of products, each with its own weights


@pytest.mark.parametrize(("family", "sets"), [("llama", 2), ("llama_tied", 1)])
def test_marker_rows_start_as_the_mean_of_their_words(family: str, sets: int) -> None:
    words = [[3], [4, 5], [6], [7], [8], [9, 9, 3]]
    base = base_model(family)
    tables = [layer.weight.clone() for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
    model = add_mote_adapter(base, mote_config(), words)
    embedded = base.get_input_embeddings()(torch.tensor([MARKER_IDS]))[0]
    weights = base.get_output_embeddings()(torch.eye(32))[:, MARKER_IDS].T
    for rows, table in zip((embedded, weights), tables, strict=True):
        assert torch.allclose(rows, torch.stack([table[ids].mean(0) for ids in words]), atol=1e-6)
    assert sum("lora_marker_rows" in name for name, _ in model.named_parameters()) == sets


@torch.no_grad()
def test_spare_rows_of_a_padded_table_are_overlaid() -> None:
    ids = [90, 91, 92, 93, 94, 95]  # inside the table
    base = base_model()
    table = base.get_input_embeddings().weight.clone()
    model = add_mote_adapter(base, mote_config(marker_ids=ids))
    randomize(model)
    embedding = base.get_input_embeddings()
    assert isinstance(embedding, MarkerEmbedding)
    rows = embedding.lora_marker_rows["default"].weight
    found = embedding(torch.tensor([[5, 92, 95]]))[0]
    assert torch.allclose(found, torch.stack([table[5], rows[2], rows[5]]))
    logits = model(input_ids=torch.tensor([[5, 6]])).logits
    assert logits.shape[-1] == VOCABULARY
    assert torch.isfinite(logits).all()


def test_marker_ids_follow_the_tokens_device() -> None:
    """Where the base was placed before the adapter was added, nothing else moves the buffer."""
    model = add_mote_adapter(base_model().to("meta"), mote_config())
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_and_autocast(dtype: torch.dtype) -> None:
    model = add_mote_adapter(base_model().to(dtype), mote_config())
    randomize(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    exact = mote()(input_ids=torch.tensor([chain()])).logits
    with torch.autocast("cpu", dtype):
        logits = model(input_ids=torch.tensor([chain()])).logits
    assert relative(logits.float(), exact) < 0.06
    logits[..., :VOCABULARY].float().sum().backward()


def test_lora_dropout_is_applied_while_training_only() -> None:
    model = mote(lora_dropout=0.5, question_routing="mean")
    ids = torch.tensor([chain()])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_merging_is_refused() -> None:
    model = mote()
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        lambda: model.base_model.add_weighted_adapter([], [], "x"),
    ):
        with pytest.raises(NotImplementedError, match="axolotl mote export"):
            merge()


def test_a_cache_without_history_and_embeddings_are_refused() -> None:
    model = mote()
    out = model(input_ids=torch.tensor([chain()]), use_cache=True)
    with pytest.raises(ValueError, match="step_ids must be given when input_ids continue a cache"):
        model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
    with pytest.raises(ValueError, match="the tokens are the router"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@torch.no_grad()
def test_a_cache_is_continued_with_the_adapter_that_filled_it() -> None:
    model = mote()
    model.add_adapter("other", mote_config())
    ids = torch.tensor([chain(question=8)])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with model.disable_adapter():
        ((key, of_base),) = named_cache(model(input_ids=ids[:, :5], use_cache=True)).items()
        assert model(input_ids=ids[:, 5:6], **{key: of_base}).logits.isfinite().all()
    given = DynamicCache()
    model(input_ids=ids[:, :5], **{key: given})
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, **{key: copy.deepcopy(given)}, **options), expected)
    message = (
        r"must be continued with the adapter that filled it; got one that the base model alone filled, for .*default"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, **{key: copy.deepcopy(of_base)}, **options)
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids[:, 6:], **{key: of_base}, step_ids=torch.ones_like(ids[:, 6:]))
    static = StaticCache(model.config, max_cache_len=64)
    with model.disable_adapter():
        model(input_ids=ids[:, :5], **{key: static})
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, **{key: static}, **options)
    static.reset()  # empty, it is as new
    assert torch.equal(model.generate(input_ids=ids, **{key: static}, **options), expected)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="got one that adapter 'default' filled, for adapter 'other'"):
        model.generate(input_ids=ids, **{key: given}, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "use_dora must stay at its default"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must stay"),
        ({"expert_weight": 1.5}, r"expert_weight must be in \[0, 1\]; got 1.5"),
        ({"question_routing": "best"}, "question_routing must be one of"),
        ({"steps": ["response", "check", "x"]}, "'check' only after the answer"),
        ({"steps": ["a", "a"]}, "must not repeat a name"),
        ({"marker_ids": [1, 2, 3]}, "marker_ids must hold 6 different ids"),
    ],
)
def test_bad_configurations_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mote_config(**values)


def test_missing_ids_and_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="marker_ids must be set"):
        add_mote_adapter(base_model(), mote_config(marker_ids=[]))
    with pytest.raises(ValueError, match="must name linear layers"):
        add_mote_adapter(base_model(), mote_config(target_modules=["embed_tokens"]))


def test_documents_are_found_in_single_rows() -> None:
    assert document_starts(torch.tensor([[4, 5]])).tolist() == [[0, 0]]
    assert MARKER_IDS[0] == VOCABULARY


# --- quantized bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "kind"), [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
def test_experts_stand_on_quantized_layers(key: str, kind: str, tmp_path: Path) -> None:
    """What the plugin hands to transformers quantizes all linear layers of the decoder; the experts train on them."""
    pytest.importorskip("bitsandbytes")
    from axolotl_mote.training.base_model import quantize_through_model_kwargs

    base_model("llama").save_pretrained(tmp_path)
    raw = {key: True, "bf16": False}
    quantize_through_model_kwargs(raw)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **raw["model_kwargs"])
    model = randomize(add_mote_adapter(base, mote_config()))
    layers = [module for module in model.modules() if isinstance(module, MoteLinear)]
    assert layers
    assert {type(layer.base_layer).__name__ for layer in layers} == {kind}
    model(input_ids=torch.tensor([chain()])).logits.float().square().mean().backward()
    assert all(layer.lora_A["default"].weight.grad is not None for layer in layers)


@pytest.mark.parametrize("labels_of", ["markers", "all"])
def test_the_models_own_loss_takes_markers_beyond_the_table(labels_of: str) -> None:
    model = mote()
    ids = torch.tensor([chain()])
    labels = torch.where(ids >= VOCABULARY, ids, -100) if labels_of == "markers" else ids
    output = model(input_ids=ids, labels=labels)
    logits = output.logits[0, :-1]
    assert torch.allclose(output.loss, nn.functional.cross_entropy(logits, labels[0, 1:]), atol=1e-5)
    assert model.config.vocab_size == VOCABULARY


def test_a_plain_transformers_trainer_trains_every_expert_and_the_rows(tmp_path: Path) -> None:
    model = mote()
    rows = [{"input_ids": chain(seed=seed), "labels": chain(seed=seed)} for seed in range(4)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert still == []
