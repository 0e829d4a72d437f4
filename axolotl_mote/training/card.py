"""The model card: README.md in the adapter's folder.

It says what the adapter is, what it was trained on and under which license, and how to load and cite it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from axolotl_mote.chain.steps import answer_step
from axolotl_mote.files import installed_versions, write_atomically
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.training.args import MoteOptions

UNKNOWN = "unknown: fill in"
SIGNATURE = "<!-- Written by axolotl_mote after each training. Remove this line to keep your own edits. -->"
_TRAINER_COMMENT = "remove this comment. -->"
"""Ends the comment in the card of transformers' trainer, which asks people who edit the card to remove it."""

_BLANK, _MANY_BLANKS = "[More Information Needed]", 25
"""PEFT's card is a template with 39 blanks; one that a person works on has fewer."""

_PACKAGES = ("axolotl_mote", "axolotl", "transformers", "peft", "torch")

_TEMPLATE = """\
---
{{ front_matter }}---
{{ signature }}

# {{ name }}

A [MoTE](https://aclanthology.org/2025.acl-long.151/) adapter (Mixture of insighTful Experts): one LoRA expert for each
step of a reasoning chain, and a shared one. The steps are {{ steps | join(", ") }}; the answer is the step
`{{ answer }}`.

| | |
|---|---|
| base model | `{{ base_model }}` |
| rank of one expert | {{ config.r }} (whole adapter: {{ config.total_rank }}) |
| lora_alpha | {{ config.lora_alpha }} |
| weight of a step's expert | {{ config.expert_weight }} (shared expert: {{ 1 - config.expert_weight }}) |
| question routing | {{ config.question_routing }} |
| step dropout | {{ step_dropout }} |
| versions | {{ versions | join(", ") }} |

## Training data

| data set | license |
|---|---|
{% for path, license in datasets -%}
| `{{ path }}` | {{ license }} |
{% endfor %}
## Use

```python
from axolotl_mote import generate_chain, load_mote

model, tokenizer = load_mote("path/to/this/folder")
chain = generate_chain(model, tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])
print(chain.answer)
```

The experts cannot be merged into one weight. `axolotl mote export` writes one plain LoRA adapter per step.

## License

{{ unknown }}. The licenses of the base model and of the training data apply.

## Citation

```bibtex
@inproceedings{liu-etal-2025-mixture,
  title     = {Mixture of insigh{T}ful Experts ({M}o{TE}): The Synergy of Reasoning Chains and Expert Mixtures in
               Self-Alignment},
  author    = {Liu, Zhili and Gou, Yunhao and Chen, Kai and Hong, Lanqing and Gao, Jiahui and Mi, Fei and Zhang, Yu and
               Li, Zhenguo and Jiang, Xin and Liu, Qun and Kwok, James T.},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics (Volume 1: Long
               Papers)},
  year      = {2025},
  pages     = {3022--3038},
  doi       = {10.18653/v1/2025.acl-long.151},
  url       = {https://aclanthology.org/2025.acl-long.151/}
}
```
"""


def write_card(folder: Path, cfg: Any, config: MoteConfig, options: MoteOptions) -> None:
    """Write README.md into an adapter's folder, unless a person wrote the one that is there.

    Args:
        folder: The adapter's folder.
        cfg: axolotl's configuration; ``base_model`` and ``datasets`` are read.
        config: The adapter's configuration.
        options: The `mote:` block.
    """
    path = folder / "README.md"
    if path.is_file() and not _is_generated(path.read_text(encoding="utf-8", errors="replace")):
        return
    write_atomically(path, build_card(folder.resolve().name, cfg, config, options))


def _is_generated(text: str) -> bool:
    """Whether no person has written or edited a card; a quote of such a line inside other text does not count."""
    lines = text.splitlines()
    from_trainer = any(line.endswith(_TRAINER_COMMENT) for line in lines)
    return SIGNATURE in lines or from_trainer or text.count(_BLANK) >= _MANY_BLANKS


def build_card(name: str, cfg: Any, config: MoteConfig, options: MoteOptions) -> str:
    """The text of the card."""
    base_model = str(cfg.get("base_model"))
    front_matter: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    front_matter["tags"] = ["axolotl", "mote", "lora"]
    if not Path(base_model).exists():  # the hub accepts names of its own models only
        front_matter["base_model"] = base_model
    paths = [str(entry.get("path")) for entry in cfg.get("datasets") or []]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(_TEMPLATE).render(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        signature=SIGNATURE,
        name=name,
        steps=config.steps,
        answer=answer_step(config.steps),
        base_model=base_model,
        config=config,
        step_dropout=", ".join(
            f"{step} {probability}"
            for step, probability in zip(options.droppable_steps, options.dropout_probabilities, strict=True)
        )
        or "none",
        versions=[f"{name} {version}" for name, version in installed_versions(_PACKAGES).items()],
        datasets=[(path, license_of(path)) for path in paths],
        unknown=UNKNOWN,
    )


def license_of(dataset: str) -> str:
    """The license in the front matter of a data set's README.md, on disk or in the local hub cache."""
    local = Path(dataset)
    if local.exists():
        readme = (local if local.is_dir() else local.parent) / "README.md"
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(dataset, "README.md", repo_type="dataset")
        except HFValidationError:  # a URL, or a path that is gone
            return UNKNOWN
        readme = Path(cached) if isinstance(cached, (str, os.PathLike)) else local
    if not readme.is_file():
        return UNKNOWN
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return UNKNOWN
    try:
        front_matter = yaml.safe_load(text.split("---\n")[1])
    except yaml.YAMLError:
        return UNKNOWN
    license = front_matter.get("license") if isinstance(front_matter, dict) else None
    return ", ".join(map(str, license)) if isinstance(license, list) else str(license or UNKNOWN)
