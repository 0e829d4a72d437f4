"""Several hosts train one adapter only if they have the same data, packages and checkpoint."""

from __future__ import annotations

import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from axolotl_mote.files import installed_versions

_DATA = "data, tokenizer and chat template"
_CHECKPOINT = "the checkpoint to resume from"
_PACKAGES = ("axolotl-mote", "axolotl", "torch", "transformers", "peft")


def check_hosts(cfg: Any) -> None:
    """Compare versions, data and checkpoint of all processes, on all of them alike. One has nothing to compare.

    Args:
        cfg: The validated configuration, whose prepared data stands in a folder named after the content of the data.

    Raises:
        ValueError: If they differ; the message names the hosts.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return
    from axolotl.utils.train import determine_last_checkpoint

    versions = installed_versions(_PACKAGES)  # first: the name of the prepared data begins with ours
    resumed = determine_last_checkpoint(cfg)
    own = {name: versions.get(name) for name in _PACKAGES} | {
        _DATA: Path(str(cfg.dataset_prepared_path)).name,
        _CHECKPOINT: Path(str(resumed)).name if resumed else "no checkpoint",
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), own))
    if fault := fault_of_hosts(found):
        raise ValueError(fault)


def fault_of_hosts(found: list[tuple[str, dict[str, Any]]]) -> str | None:
    """What differs between hosts; None if nothing does.

    Args:
        found: Of every process: its host, and its values by name.
    """
    for name in found[0][1]:
        hosts: dict[Any, set[str]] = defaultdict(set)
        for host, values in found:
            hosts[values[name]].add(host)
        if len(hosts) > 1:
            kinds = "; ".join(f"{', '.join(sorted(names))}: {value}" for value, names in hosts.items())
            same_files = name in (_DATA, _CHECKPOINT)
            way_out = "Copy the same files to all hosts." if same_files else "Install the same version everywhere."
            return f"{name} must be the same on all hosts; got {kinds}. {way_out}"
    return None
