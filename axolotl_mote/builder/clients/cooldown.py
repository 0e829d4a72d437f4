"""How long a replica cools down: what its headers ask for, or longer with every failure in a row."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNIT_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def failure_cooldown(failures: int, backoff: float, longest: float) -> float:
    """Seconds after so many failures in a row: ``backoff``, doubled each time, up to ``longest``."""
    return min(longest, backoff * 2.0 ** min(failures - 1, 16))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait as asked by retry-after-ms or Retry-After (seconds or a date), else by ``rate_limit_reset``."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
            return max(0.0, seconds) if math.isfinite(seconds) else 0.0
        value = headers.get("retry-after", "")
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        if not value:
            return rate_limit_reset(headers)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def rate_limit_reset(headers: Mapping[str, str]) -> float:
    """Seconds until a used-up limit is reset, by x-ratelimit-remaining-* and -reset-* ("1s", "6m0s", "20ms")."""
    waits = [0.0]
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            parts = _DURATION.findall(headers.get(f"x-ratelimit-reset-{kind}", ""))
            waits.append(sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts))
    return max(waits)
