"""Every line in order: a line that fails, or breaks, does not keep the others from running."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence

from axolotl_mote.doctor import estimate, launched, reading, routes, trained
from axolotl_mote.doctor.lines import FAILED, NOT_TESTED, Finding, NotTestedError
from axolotl_mote.doctor.session import Session

CHECKS: dict[str, Callable[[Session], Finding]] = {
    "versions": reading.check_versions,
    "config": reading.check_configuration,
    "family": reading.check_family,
    "data": reading.check_data,
    "markers": reading.check_markers,
    **routes.CHECKS,
    **trained.CHECKS,
    **launched.CHECKS,
    **estimate.CHECKS,
}

_KEYS = {
    "config": "the configuration",
    "data": "datasets",
    "markers": "tokenizer_config",
    "model": "base_model",
    "step-dropout": "mote.step_dropout",
    "checkpointing": "gradient_checkpointing",
    "packing": "sample_packing",
    "compile": "mote.compile",
    "resume": "save_strategy",
}
"""Where to look when a check breaks instead of giving a verdict; base_model for all others."""
_NAMED = re.compile(r"\b([a-z]\w*(?:[.\[]\w+\]?)*) (?:must|is no key)\b")


def run_lines(
    session: Session, names: Sequence[str], begin: Callable[[str], object] = lambda _: None
) -> Iterator[Finding]:
    """Run lines one after another.

    Args:
        session: What they look at.
        names: Which; from ``lines.choose``.
        begin: Called with the name of each line before it runs.

    Yields:
        The finding of each line, named and timed. A check that raises has failed, with the last line of its error.
    """
    for name in names:
        begin(name)
        start = time.perf_counter()
        try:
            finding = CHECKS[name](session)
        except NotTestedError as reason:
            finding = Finding(NOT_TESTED, str(reason))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this line's result
            text = _last_line(error)
            named = _NAMED.search(text) if name == "config" else None
            finding = Finding(FAILED, text, named.group(1) if named else _key_of(name, session))
        finding.line, finding.seconds = name, time.perf_counter() - start
        yield finding


def _key_of(name: str, session: Session) -> str:
    if name in ("processes", "sharding"):
        return session.sharding[0] if session.sharding else "micro_batch_size"
    return _KEYS.get(name, "base_model")


def _last_line(error: BaseException) -> str:
    """What an error says, in one line: axolotl and pydantic write several, of which the first names no key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith("For further information")]
    kind = type(error).__name__
    if kind == "ValidationError":
        return "; ".join(useful[1:]) or kind
    return f"{kind}: {useful[-1]}" if useful else kind
