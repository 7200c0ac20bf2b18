"""What a model answered to a fixed text: how it is written down, and how far two may be apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import hypot

Answer = Mapping[int, float]
"""Numbers by their place: a vector's, of which zeros may be left out, or a score a text."""

_FLOAT32, _OTHERS = 0.01, 0.25
"""Most distance, as a part of the first answer's length. Other kernels, threads and TF32 make up to 0.001 in float32;
half the digits, or 8 bits on another CPU, up to 0.1. Vectors of other weights are 1 or more apart."""

_LEAST_LENGTH = 0.1
"""Shorter answers, scores near zero, are measured by it."""


def written(answer: Answer) -> str:
    """As JSON, with 6 significant digits."""
    return json.dumps({str(place): float(f"{number:.6g}") for place, number in answer.items()}, separators=(",", ":"))


def read_answer(text: str) -> Answer:
    """An answer from its JSON; an empty one if it is none."""
    try:
        return {int(place): float(number) for place, number in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def distance(first: Answer, other: Answer) -> float:
    """The length of their difference, as a part of that of `first`."""
    apart = hypot(*(first.get(place, 0.0) - other.get(place, 0.0) for place in {*first, *other}))
    return apart / max(hypot(*first.values()), _LEAST_LENGTH)


def allowed(fingerprint: str) -> float:
    """The most distance between two workers of that fingerprint, which names the dtype."""
    return _FLOAT32 if " float32 " in f"{fingerprint} " else _OTHERS
