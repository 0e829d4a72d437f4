"""`export_served`: a base model with the marker rows, and the adapter as training wrote it, for `axolotl mote serve`.

The server routes inside the engine, so the adapter stays one LoRA of rank (S + 1) * r. It keeps its marker rows: a
server without this package then refuses the file by their names, and one with it compares them with the base's rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from axolotl_mote.export.api import TOLERANCE, check_replaceable, record_probes, writing
from axolotl_mote.export.folders import load_written_base, read_adapter, write_base
from axolotl_mote.export.verification import Probe, make_probes
from axolotl_mote.export.weights import LORA_A, SERVED_RANKS, largest_difference, marker_rows
from axolotl_mote.files import folder_in_one_rename, write_atomically
from axolotl_mote.generation.folder import CONFIG, WEIGHTS, base_of, check_fits
from axolotl_mote.generation.loading import load_base, load_mote, load_tokenizer
from axolotl_mote.model.config import MoteConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "vllm"
BASE, ADAPTER, REPORT = "base", "adapter", "export.json"

_UNGATED = ("lm_head", "embed_tokens", "embed_in", "wte")
"""Last part of the name of a layer whose LoRA does not pass the place where the engine gates."""


@dataclass
class ServedReport:
    """What was written for a server; also export.json.

    Args:
        format: Always "vllm".
        rank: Rank of the adapter, (S + 1) * r.
        served_rank: Smallest value of --max-lora-rank that holds it.
        steps: Names of the steps.
        dtype: Type of the base model's weights on disk.
        verified: Whether the written folder was loaded again and compared with the step-routed model.
        tokens: Tokens compared.
        largest_difference: Largest difference of a logit.
    """

    rank: int
    served_rank: int
    steps: list[str]
    dtype: str = "float32"
    format: str = FORMAT
    verified: bool = False
    tokens: int = 0
    largest_difference: float | None = None


def export_served(
    adapter_dir: str | Path,
    output: str | Path,
    base_model: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    verify: bool = True,
    probes: Sequence[Sequence[int]] | None = None,
    overwrite: bool = False,
) -> ServedReport:
    """Write ``base/``, ``adapter/`` and ``export.json``, which ``axolotl mote serve OUTPUT`` takes.

    Args:
        adapter_dir: The trained adapter.
        output: Folder to write. It appears once it is complete and, unless ``verify`` is off, verified.
        base_model: Base model folder or name; default: the one in adapter_config.json.
        dtype: Type of the base model on disk; "auto" keeps that of the checkpoint.
        device: Where to verify; default: the first GPU if there is one.
        verify: Load the folder again and compare it with the step-routed model.
        probes: Token ids of whole chains to verify on; default: the model's own chains for three questions.
        overwrite: Replace an earlier export.

    Returns:
        The report.

    Raises:
        ValueError: If the output exists, the adapter cannot be gated in the engine, or verification fails.
    """
    adapter_dir, output = Path(adapter_dir), Path(output)
    if output.exists() and not overwrite:
        raise ValueError(f"output must not exist yet; got {output}. Choose another folder or pass --overwrite.")
    config, tensors = read_adapter(adapter_dir)
    check_can_be_gated(tensors)
    report = ServedReport(config.total_rank, served_rank(config.total_rank), list(config.steps))
    base = base_of(config, adapter_dir, base_model)
    check_replaceable(output, [adapter_dir, Path(base)])
    recorded = record_probes(adapter_dir, base, config, dtype, device, probes) if verify else []
    tokenizer, model = load_tokenizer(adapter_dir, base, config), load_base(base, dtype=dtype)
    check_fits(model, base, {name: tuple(t.shape) for name, t in tensors.items()}, config, adapter_dir)
    with writing(output), folder_in_one_rename(output, replace=overwrite) as staging:
        report.dtype = str(model.dtype).removeprefix("torch.")
        write_base(staging / BASE, model, tokenizer, config, tensors, merge_shared=False)
        del model
        _write_adapter(staging / ADAPTER, str((output / BASE).resolve()), config, tensors, tokenizer)
        if verify:
            _verify(report, staging, config, tensors, recorded, device)
        write_atomically(staging / REPORT, json.dumps(asdict(report), indent=2) + "\n")
    return report


def check_can_be_gated(names: Iterable[str]) -> None:
    """Check that an engine can gate every layer of an adapter.

    Args:
        names: Names of its tensors, or of its layers.

    Raises:
        ValueError: If it changes fused experts, a head or an embedding.
    """
    layers = sorted({name.removesuffix(LORA_A) for name in names if "marker_rows" not in name})
    wrong = [name for name in layers if ".experts" in name or name.split(".lora_")[0].rpartition(".")[2] in _UNGATED]
    if wrong:
        raise ValueError(
            f"adapter must change only layers that vLLM lets us gate; got experts on {wrong[0]}"
            f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}. Train without them in lora_target_modules, or "
            "use `axolotl mote generate`."
        )


def served_rank(rank: int) -> int:
    """The smallest --max-lora-rank that holds a rank: 48 -> 64.

    Raises:
        ValueError: If there is none.
    """
    for value in SERVED_RANKS:
        if value >= rank:
            return value
    raise ValueError(
        f"the rank of an adapter, (steps + 1) * lora_r, must be at most {SERVED_RANKS[-1]} for vLLM; got {rank}. "
        "Train with a smaller lora_r."
    )


def _write_adapter(
    folder: Path,
    base: str,
    config: MoteConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The adapter, on the base model beside it."""
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors writes for the owner only
    tokenizer.save_pretrained(folder)


def _verify(
    report: ServedReport,
    folder: Path,
    config: MoteConfig,
    tensors: Mapping[str, Tensor],
    probes: Sequence[Probe],
    device: str | None,
) -> None:
    """Load what was written and compare it with the adapter's rows and the step-routed model's logits.

    Raises:
        ValueError: If a difference is larger than rounding.
    """
    worst = max(_row_differences(folder / BASE, config, tensors))
    if worst:
        raise ValueError(
            f"base must hold the adapter's marker rows; got rows that differ by {worst:.2e}. Nothing was written. "
            "transformers cannot resize this family's tables; use load_mote."
        )
    model, _ = load_mote(folder / ADAPTER, folder / BASE, dtype=torch.float32, device=device)
    for probe, again in zip(probes, make_probes(model, config, [p.ids.tolist() for p in probes]), strict=True):
        worst = max(worst, largest_difference(again.logits, probe.logits))
        report.tokens += len(probe.ids)
    report.verified, report.largest_difference = True, worst
    if worst > TOLERANCE:
        raise ValueError(
            f"the written folder must give the step-routed model's logits up to {TOLERANCE:.0e}; got a difference of "
            f"{worst:.2e}. Nothing was written. Use load_mote."
        )


@torch.no_grad()
def _row_differences(base: Path, config: MoteConfig, tensors: Mapping[str, Tensor]) -> list[float]:
    """Largest difference of the marker rows of the written embedding, and of the head, from the adapter's."""
    model: Any = load_written_base(base, "auto")
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return [
        largest_difference(table[config.marker_ids], rows.to(table.dtype))
        for table, rows in zip(tables, marker_rows(tensors), strict=True)
    ]
