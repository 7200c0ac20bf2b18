"""Reads durations ("10ms", "5m") and sizes ("64MB") from configuration and the command line."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from millstream.broker.contract.scalars import plain

_TEN_YEARS = Decimal(10 * 365 * 86_400)
_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3_600), "d": Decimal(86_400)}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NUMBER = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?"
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?\s*([a-z]*)", re.IGNORECASE)

DURATION_PATTERN = rf"^\s*{_NUMBER}\s*({'|'.join(_SECONDS)})?\s*$"
SIZE_PATTERN = rf"^\s*{_NUMBER}\s*([kKmMgG]?[bB]|[kKmMgG][iI][bB])?\s*$"
"""Patterns of the texts that `seconds` and `size` accept; a text that matches may still be too large."""


def seconds(value: object) -> float:
    """Returns seconds from a number, or from text with a unit: "10ms", "1.5s", "5m", "2h", "1d".

    Raises ValueError if `value` is neither, is negative or exceeds ten years.
    """
    number, unit = _quantity(plain(value))
    scale = _SECONDS.get(unit or "s")
    if scale is None:
        raise ValueError('must be seconds as a number, or a duration such as "10ms", "5s", "5m" or "2h"')
    if number * scale > _TEN_YEARS:
        raise ValueError("must be at most ten years")
    return float(number * scale)


def size(value: object) -> int:
    """Returns bytes from a number, or from text with a unit: "64MB" (64,000,000), "64MiB" (67,108,864).

    Raises ValueError if `value` is neither, is negative or exceeds 2**63.
    """
    number, unit = _quantity(plain(value))
    scale = _BYTES.get((unit or "b").lower())
    if scale is None or number * scale > 2**63:
        raise ValueError('must be bytes as a number, or a size such as "64MB" or "2GiB"')
    return int(number * scale)


def _quantity(value: object) -> tuple[Decimal, str]:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        match = _QUANTITY.fullmatch(str(value).strip())
        if match:
            return Decimal(match[1] + (match[2] or "")), match[3]
        if isinstance(value, int | float) and not math.isnan(value) and value < 0:
            raise ValueError("must not be negative")
    return Decimal(0), "no unit"
