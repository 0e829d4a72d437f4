"""`export_adapter`: write the parts, load them again with plain PEFT, and compare them with the step-routed model."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig

from axolotl_mote.export.folders import load_written_base, read_adapter, write_adapter, write_base
from axolotl_mote.export.verification import Drift, Probe, differences, drifts, make_probes
from axolotl_mote.export.weights import AdapterPlan, plan_adapters
from axolotl_mote.files import folder_in_one_rename, write_atomically
from axolotl_mote.generation.api import generate_chain
from axolotl_mote.generation.folder import base_of, check_fits
from axolotl_mote.generation.loading import codec_for, load_base, load_mote, load_tokenizer
from axolotl_mote.model.config import MoteConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 1e-3
"""Largest difference of a logit that counts as rounding in float32; logits of real models exceed 30."""

_QUESTIONS = (
    "How do I kill a Python process that does not react?",
    "My neighbor's dog barks all night. What can I do about it?",
    "Name three uses of vinegar in a kitchen.",
)
_PROBE_TOKENS = 24


@dataclass
class ExportReport:
    """What was written and how it compares with the step-routed model; also export.json.

    Args:
        adapters: Per adapter: rank, rank before padding, parameters, tokens compared and largest difference of a logit
            (None: not verified), and its drift when earlier steps are re-prefilled under it.
        dtype: Type of the base model's weights on disk.
        merged_shared: Whether the shared expert is part of the base model.
        verified: Whether the parts were compared with the step-routed model.
        largest_difference: The worst of all adapters.
        exact: Whether the two differ only by rounding of float32 arithmetic (see docs/export.md).
    """

    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtype: str = "float32"
    merged_shared: bool = False
    verified: bool = False
    largest_difference: float | None = None
    exact: bool = True


def export_adapter(
    adapter_dir: str | Path,
    output: str | Path,
    base_model: str | Path | None = None,
    *,
    merge_shared: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    write_base_model: bool = True,
    verify: bool = True,
    probes: Sequence[Sequence[int]] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write one plain LoRA adapter per step and for the question, and a base model that contains the marker rows.

    Args:
        adapter_dir: The trained adapter.
        output: Folder to write: ``base/``, ``adapters/<name>/``, ``export.json``. It appears once everything in it is
            complete and, unless ``verify`` is off, verified.
        base_model: Base model folder or name; default: the one in adapter_config.json.
        merge_shared: Add the shared expert to the base model's weights; step adapters then have rank r instead of 2 r.
        dtype: Type of the base model on disk; "auto" keeps that of the checkpoint.
        device: Where to verify; default: the first GPU if there is one.
        write_base_model: Off: write the adapters only (verification then uses a temporary base model).
        verify: Compare with the step-routed model and measure drift.
        probes: Token ids of whole chains to verify on; default: the model's own full chains for three questions.
        overwrite: Replace an existing output folder.

    Returns:
        The report.

    Raises:
        ValueError: If the output exists, the adapter is not a MoTE adapter, or verification fails.
    """
    adapter_dir, output = Path(adapter_dir), Path(output)
    if output.exists() and not overwrite:
        raise ValueError(f"output must not exist yet; got {output}. Choose another folder or pass --overwrite.")
    config, tensors = read_adapter(adapter_dir)
    base = base_of(config, adapter_dir, base_model)
    check_replaceable(output, [adapter_dir, Path(base)])
    plans = plan_adapters(config, merge_shared)
    report = ExportReport(merged_shared=merge_shared)
    recorded = record_probes(adapter_dir, base, config, dtype, device, probes) if verify else []
    tokenizer, model = load_tokenizer(adapter_dir, base, config), load_base(base, dtype=dtype)
    check_fits(model, base, {name: tuple(t.shape) for name, t in tensors.items()}, config, adapter_dir)
    with writing(output), folder_in_one_rename(output, replace=overwrite) as staging:
        report.dtype = str(model.dtype).removeprefix("torch.")
        report.exact = report.dtype == "float32" or not merge_shared
        write_base(staging / "base", model, tokenizer, config, tensors, merge_shared)
        del model
        named_base = base
        if write_base_model or Path(base).is_dir():  # absolute: PEFT looks from wherever it is called
            named_base = str((output / "base" if write_base_model else Path(base)).resolve())
        for plan in plans:
            report.adapters[plan.name] = _describe(plan)
            if plan.rank:
                write_adapter(staging / "adapters" / plan.name, named_base, config, plan, tensors)
        if verify:
            _verify(report, staging, plans, config, recorded, device)
        if not write_base_model:
            shutil.rmtree(staging / "base")
        write_atomically(staging / "export.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Name the output where a full disk raises errors without a path, some of them of the safetensors library."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"output must be writable; got {error} at {output}. Nothing was written; free space and try again."
        ) from error


def check_replaceable(output: Path, used: Sequence[Path]) -> None:
    """Refuse to overwrite anything but an earlier export, or what the export is made from."""
    for path in used:
        if path.exists() and path.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"output must not hold what is exported; got {output} for {path}. Choose another folder.")
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not empty and not (output / "export.json").is_file():
        raise ValueError(f"--overwrite must replace an earlier export only; got {output}. Choose another folder.")


def _describe(plan: AdapterPlan) -> dict[str, Any]:
    return {"rank": plan.served_rank, "rank_before_padding": plan.rank, "difference": None, "tokens": 0, "drift": None}


def record_probes(
    adapter_dir: Path,
    base: str,
    config: MoteConfig,
    dtype: str,
    device: str | None,
    given: Sequence[Sequence[int]] | None,
) -> list[Probe]:
    """Logits of the step-routed model, computed in float32 from weights rounded to the type on disk."""
    stored = dtype
    if dtype == "auto":
        stored = str(AutoConfig.from_pretrained(base).dtype or torch.float32).removeprefix("torch.")
    model, tokenizer = load_mote(adapter_dir, base, dtype=torch.float32, device=device)
    _round_stored(model, getattr(torch, stored))
    sequences = list(given) if given is not None else _own_chains(model, tokenizer, config)
    probes = make_probes(model, config, sequences)
    del model
    gc.collect()
    return probes


@torch.no_grad()
def _round_stored(model: PeftModel, dtype: torch.dtype) -> None:
    """Round base weights and marker rows to the type that they have on disk; the experts stay in float32."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name or "lora_marker_rows" in name:
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def _own_chains(model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: MoteConfig) -> list[list[int]]:
    """Question and full chain, as the step-routed model itself writes it, end of turn included."""
    codec = codec_for(model, tokenizer)
    dialogues = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    chains = generate_chain(model, tokenizer, dialogues, list(config.steps), step_limits=_PROBE_TOKENS)
    return [
        [*codec.encode_question(messages), *chain.token_ids, *codec.end_of_turn]
        for messages, chain in zip(dialogues, chains, strict=True)
    ]


def _verify(
    report: ExportReport,
    folder: Path,
    plans: list[AdapterPlan],
    config: MoteConfig,
    probes: list[Probe],
    device: str | None,
) -> None:
    """Load the exported parts with plain PEFT and compare.

    Raises:
        ValueError: If a difference is larger than rounding.
    """
    model = _load_exported(folder, plans, device)
    names = {plan.step: plan.name if plan.rank else None for plan in plans}
    for step, (difference, tokens) in differences(model, names, probes).items():
        report.adapters[plans[step].name] |= {"difference": difference, "tokens": tokens}
    found: dict[str, Drift] = drifts(model, names, probes, config)
    for name, drift in found.items():
        report.adapters[name]["drift"] = asdict(drift)
    report.verified = True
    worst = max(entry["difference"] for entry in report.adapters.values() if entry["difference"] is not None)
    report.largest_difference = worst
    if report.exact and worst > TOLERANCE:
        raise ValueError(
            f"exported adapters must give the step-routed model's logits up to {TOLERANCE:.0e}; got a difference of "
            f"{worst:.2e}. Nothing was written. Plain PEFT cannot hold one adapter per step for every base model: on "
            "mixtures of experts it takes the names of plain MLP layers for fused experts, and where latents are "
            "cached a later step would change the tokens of earlier ones. Use load_mote; docs/support-matrix.md lists "
            "the families."
        )


def _load_exported(folder: Path, plans: list[AdapterPlan], device: str | None) -> PeftModel | PreTrainedModel:
    """The exported base model with all adapters; without any if no step needs one."""
    model: Any = load_written_base(folder / "base", torch.float32)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for plan in plans:
        if not plan.rank:
            continue
        path = folder / "adapters" / plan.name
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=plan.name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=plan.name)
    return model.eval()
