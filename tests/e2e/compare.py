"""Compare the adapters of two runs."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file


def largest_difference(expected: Path, found: Path) -> float:
    """Largest relative difference of a tensor, ||found - expected|| / ||expected||, over all tensors of an adapter.

    A tensor that training has not moved would make the figure meaningless: none may be zero.
    """
    a, b = load_file(expected / "adapter_model.safetensors"), load_file(found / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    assert a
    differences = {}
    for name in a:
        size = float(a[name].double().norm())
        assert size > 0, f"{name} is zero in {expected}"
        differences[name] = float((b[name].double() - a[name].double()).norm()) / size
    worst = max(differences, key=differences.__getitem__)
    print(f"{found.parent.name} against {expected.parent.name}: {differences[worst]:.2e} at {worst}")
    return differences[worst]
