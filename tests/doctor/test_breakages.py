"""The product is broken in one place, and the doctor names it in the line that is about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_kit import write_tiny_config
from peft import PeftModel
from safetensors.torch import load_file, save_file

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import IGNORE_INDEX, end_marker, start_marker
from axolotl_mote.doctor import routes
from axolotl_mote.doctor.lines import FAILED, NOT_APPLICABLE, NOT_TESTED, OK, Finding
from axolotl_mote.doctor.run import run_lines
from axolotl_mote.doctor.session import Session
from axolotl_mote.doctor.trained import WEIGHTS
from axolotl_mote.model import routed
from axolotl_mote.model.adapter import MoteLinear
from axolotl_mote.model.routed import RoutedModel, Routing
from axolotl_mote.training.trainer import MoteTrainer

Patch = pytest.MonkeyPatch
Open = Callable[..., Session]
R = 4  # rank of one expert in the tests' configuration
FORWARD = ("model", "routing", "gradients", "step-dropout", "checkpointing", "packing", "generation", "disabled")


def examine(session: Session, *names: str) -> dict[str, Finding]:
    found = {finding.line: finding for finding in run_lines(session, names)}
    for finding in found.values():
        print(f"{finding.line:14} {finding.verdict:14} {finding.text}")
    return found


def failed(found: dict[str, Finding]) -> set[str]:
    assert all(finding.key for finding in found.values() if finding.verdict == FAILED)
    return {name for name, finding in found.items() if finding.verdict == FAILED}


# --- breakages of the model -----------------------------------------------------------------------------------------


def ignore_the_gate(patch: Patch) -> None:
    patch.setattr(Routing, "gate_of", lambda self, x: torch.ones(*x.shape[:-1], self.gate.shape[-1]))


def route_one_token_late(patch: Patch) -> None:
    right = routed.step_ids_from_tokens

    def late(*args: Any) -> Any:
        steps = right(*args)
        return torch.cat([steps[:, :1], steps[:, :-1]], dim=1)

    patch.setattr(routed, "step_ids_from_tokens", late)


def ignore_dropped_steps(patch: Patch) -> None:
    right = routed.build_attention_mask

    def build(visibility: Any, *args: Any) -> Any:
        return right(replace(visibility, dropped=torch.zeros_like(visibility.dropped)), *args)

    patch.setattr(routed, "build_attention_mask", build)


def freeze_an_expert(patch: Patch) -> None:
    right = MoteLinear.update_layer

    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        right(self, adapter_name, *args, **kwargs)
        columns = torch.ones(4 * R)
        columns[R : 2 * R] = 0
        self.lora_B[adapter_name].weight.register_hook(lambda gradient: gradient * columns)
        self.lora_A[adapter_name].weight.register_hook(lambda gradient: gradient * columns.unsqueeze(1))

    patch.setattr(MoteLinear, "update_layer", update)


def let_absent_experts_learn(patch: Patch) -> None:
    right = Routing.gate_of
    # So little that no output shows it.
    patch.setattr(Routing, "gate_of", lambda self, x: right(self, x) + 1e-7)


def recompute_with_another_route(patch: Patch) -> None:
    patch.setattr(Routing, "restore_before", lambda self, output: None)


def leak_between_documents(patch: Patch) -> None:
    patch.setattr(routed, "document_starts", lambda ids, position_ids=None: torch.zeros_like(ids))


def drop_the_rows_of_an_expert(patch: Patch) -> None:
    right = PeftModel.save_pretrained

    def save(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        right(self, folder, *args, **kwargs)
        file = Path(folder) / WEIGHTS
        save_file({n: t[: 3 * R].clone() if "lora_A" in n else t for n, t in load_file(file).items()}, file)

    patch.setattr(PeftModel, "save_pretrained", save)


def swap_two_experts_on_loading(patch: Patch) -> None:
    right = PeftModel.from_pretrained.__func__

    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model = right(cls, *args, **kwargs)
        order = [*range(R, 2 * R), *range(R), *range(2 * R, 4 * R)]
        with torch.no_grad():
            for layer in [module for module in model.modules() if isinstance(module, MoteLinear)]:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                a.copy_(a[order].clone())
                b.copy_(b[:, order].clone())
        return model

    patch.setattr(PeftModel, "from_pretrained", classmethod(load))


def keep_the_adapter_when_disabled(patch: Patch) -> None:
    patch.setattr(MoteLinear, "disable_adapters", property(lambda self: False, lambda self, value: None))
    patch.setattr(routed, "_active_adapter", lambda model: "default")


def stay_with_one_expert_while_generating(patch: Patch) -> None:
    right = RoutedModel.prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = right(self, *args, **kwargs)
        return inputs | {"step_ids": torch.zeros_like(inputs["step_ids"])}

    patch.setattr(RoutedModel, "prepare_inputs_for_generation", prepare)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Session:
    """A session whose model is loaded; a breakage of its forward needs no other."""
    folder = tmp_path_factory.mktemp("healthy")
    (folder / "runs").mkdir()
    session = Session(write_tiny_config(folder, tiny_folder, sample_packing=True), folder / "runs", processes=1)
    assert failed(examine(session, *FORWARD)) == set()
    return session


@pytest.mark.parametrize(
    ("breakage", "line", "others"),
    [
        (ignore_the_gate, "routing", FORWARD),
        (route_one_token_late, "routing", FORWARD),
        (ignore_dropped_steps, "step-dropout", ("model",)),
        (let_absent_experts_learn, "gradients", ()),
        (recompute_with_another_route, "checkpointing", ()),
        (leak_between_documents, "packing", ()),
        (keep_the_adapter_when_disabled, "disabled", ()),
        (stay_with_one_expert_while_generating, "generation", ("model",)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_forward(
    breakage: Callable[[Patch], None], line: str, others: tuple[str, ...], healthy: Session, monkeypatch: Patch
) -> None:
    breakage(monkeypatch)
    found = failed(examine(healthy, *FORWARD))
    assert line in found
    assert found <= {line, *others}


def test_an_expert_that_gets_no_gradient(open_session: Open, monkeypatch: Patch) -> None:
    freeze_an_expert(monkeypatch)
    found = examine(open_session(), "gradients")["gradients"]
    assert found.verdict == FAILED
    assert "guidance gets no gradient in 14 layers" in found.text


@pytest.mark.parametrize("breakage", [drop_the_rows_of_an_expert, swap_two_experts_on_loading])
def test_an_adapter_that_is_not_saved_or_loaded_whole(
    breakage: Callable[[Patch], None], open_session: Open, monkeypatch: Patch
) -> None:
    breakage(monkeypatch)
    assert failed(examine(open_session(), "saving")) == {"saving"}


# --- breakages of text ----------------------------------------------------------------------------------------------


def test_markers_that_are_encoded_as_text(open_session: Open, monkeypatch: Patch) -> None:
    def encode(self: ChainCodec, row: dict[str, Any]) -> dict[str, list[int]]:
        question, chain = self.encode_question(row["messages"]), []
        for step in self.steps:
            if row.get(step):
                chain += self.encode_text(f"{start_marker(step)}{row[step]}{end_marker(step)}")
        ids = [*question, *chain, *self.end_of_turn]
        labels = [IGNORE_INDEX] * len(question) + ids[len(question) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    monkeypatch.setattr(ChainCodec, "encode_chain", encode)
    found = examine(open_session(), "data", "markers")
    assert failed(found) == {"data", "markers"}
    assert "have no whole steps" in found["markers"].text


def test_a_template_that_leaves_the_question_out(open_session: Open) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] if m['role'] == 'assistant' }}"
    template += "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    found = examine(open_session(chat_template="jinja", chat_template_jinja=template), "config", "markers")
    assert failed(found) == {"markers"}
    assert found["markers"].key == "chat_template"
    assert "leaves out the user's text" in found["markers"].text


def test_a_step_that_sequence_len_drops(open_session: Open) -> None:
    found = examine(open_session(sequence_len=80), "data")["data"]
    assert (found.verdict, found.key) == (FAILED, "sequence_len")
    assert "no chain is left with guidance" in found.text
    assert "row 1: " in found.text


def test_a_refused_configuration(open_session: Open) -> None:
    found = examine(open_session(lora_qkv_kernel=True), "config", "data", "routing")
    assert failed(found) == {"config"}
    assert "lora_qkv_kernel must not be set with adapter: mote" in found["config"].text
    assert found["config"].key == "lora_qkv_kernel"
    assert {found[name].verdict for name in ("data", "routing")} == {NOT_TESTED}


# --- breakages of training ------------------------------------------------------------------------------------------


def test_an_expert_that_does_not_move(open_session: Open, monkeypatch: Patch) -> None:
    freeze_an_expert(monkeypatch)
    found = examine(open_session(weight_decay=0.0), "training")["training"]
    assert found.verdict == FAILED
    assert "guidance did not move" in found.text


def test_an_expert_that_no_chain_asked_for(open_session: Open) -> None:
    """Without random routing of questions, experts of steps that do not occur stay; that is no fault."""
    mote = {"question_routing": "shared", "step_dropout": 0.5, "steps": ["analysis", "guidance", "response", "check"]}
    found = examine(open_session(mote=mote), "data", "training")
    assert (found["data"].verdict, found["data"].key) == (FAILED, "mote.steps")
    assert found["training"].verdict == NOT_TESTED
    assert "has check: raise --steps" in found["training"].text


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_experts_without_a_weight_are_no_fault(open_session: Open, weight: float) -> None:
    session = open_session(mote={"expert_weight": weight, "step_dropout": 0.0})
    found = examine(session, "routing", "gradients", "step-dropout", "training")
    assert [found[name].verdict for name in ("gradients", "training")] == [OK, OK]
    assert found["step-dropout"].verdict == NOT_APPLICABLE


def test_draws_that_start_anew_after_resuming(open_session: Open, monkeypatch: Patch) -> None:
    right = MoteTrainer.compute_loss

    def compute(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        own, self.count = self.state.global_step, getattr(self, "count", -1) + 1
        self.state.global_step = self.count
        try:
            return right(self, model, inputs, *args, **kwargs)
        finally:
            self.state.global_step = own

    monkeypatch.setattr(MoteTrainer, "compute_loss", compute)
    assert failed(examine(open_session(), "resume")) == {"resume"}


def test_compiled_layers_with_another_gate(open_session: Open, monkeypatch: Patch) -> None:
    mote = {"question_routing": "random", "step_dropout": 0.5, "compile": "layers"}
    session = open_session(mote=mote, torch_compile_backend="aot_eager")
    found = examine(session, "compile")["compile"]
    assert found.verdict == OK, found.text
    right, set_gate = routes.compile_layers, Routing.set_gate

    def set_another(self: Routing, step_ids: Any) -> None:
        set_gate(self, step_ids)
        self.gate = self.gate.roll(R, -1)

    def compile_wrongly(*args: Any) -> None:
        right(*args)
        monkeypatch.setattr(Routing, "set_gate", set_another)

    monkeypatch.setattr(routes, "compile_layers", compile_wrongly)
    assert failed(examine(session, "compile")) == {"compile"}


# --- breakages of several processes ---------------------------------------------------------------------------------


def test_a_shard_that_is_empty_or_did_not_move(open_session: Open, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    session = open_session(processes=2, deepspeed=str(tmp_path / "ds.json"))
    reference = session.once("reference run", lambda: session.train("reference", session.comparable()))
    session.once("run of several processes", lambda: tmp_path)
    for name in list(reference.after)[:3]:
        for spoilt in (torch.zeros(0), reference.before[name]):
            save_file({**reference.after, name: spoilt.contiguous()}, tmp_path / WEIGHTS)
            assert failed(examine(session, "sharding")) == {"sharding"}
    save_file(reference.after, tmp_path / WEIGHTS)
    assert examine(session, "sharding", "processes")["processes"].verdict == OK
