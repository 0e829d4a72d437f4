"""Several hosts train one adapter only if they have the same data and the same package."""

from __future__ import annotations

import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from axolotl_mote.files import installed_versions

_PACKAGES = ("axolotl-mote", "axolotl", "torch", "transformers", "peft")


def check_hosts(cfg: Any) -> None:
    """Compare data and versions of all processes, on all of them alike. One process has nothing to compare.

    Args:
        cfg: The validated configuration, whose prepared data stands in a folder named after the content of the data.

    Raises:
        ValueError: If they differ; the message names the hosts.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return
    versions = installed_versions(_PACKAGES)
    own = {"data": Path(str(cfg.dataset_prepared_path)).name} | {name: versions.get(name) for name in _PACKAGES}
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
            way_out = "Copy the same files to all hosts." if name == "data" else "Install the same version everywhere."
            return f"{name} must be the same on all hosts; got {kinds}. {way_out}"
    return None
