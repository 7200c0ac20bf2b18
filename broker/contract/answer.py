"""A model's answer to a fixed text: its written form, and the allowed distance between two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import hypot

Answer = Mapping[int, float]
"""Numbers by their place: a vector's, of which zeros may be left out, or a score a text."""

_FIELD = "answer"

MOST_PLACES = 64
"""Places of an answer that are written down, spread over it: supervisors read them with each beat."""

_FLOAT32, _OTHERS = 0.01, 0.25
"""Most distance, as a part of the first answer's length. Other kernels, threads and TF32 make up to 0.001 in float32;
half the digits, or 8 bits on another CPU, up to 0.1. Vectors of other weights are 1 or more apart."""

_LEAST_LENGTH = 0.1
"""The least length that a distance is divided by, for vectors that are cut and cosines near zero."""

_LEAST_LOGITS = {_FLOAT32: 1.0, _OTHERS: 4.0}
"""The same for logits. Near zero they are sums of larger numbers: bfloat16 has steps of 0.125 between 16 and 32."""

_SCORES = (" cross-encoder ", " generative ")
"""Words in the fingerprints of models whose answers are logits."""


def answer_field(fingerprint: str) -> str:
    """The field of a service for the answer of these weights.

    Named by them, so that no other weights are held to it: versions that know no answers forget the fingerprint alone.
    """
    return f"{_FIELD} {fingerprint}"


def is_answer(field: str) -> bool:
    """Whether a field of a service holds the answer of some weights."""
    return field.partition(" ")[0] == _FIELD


def written(answer: Answer) -> str:
    """The answer as JSON: at most MOST_PLACES numbers of 4 significant digits."""
    places = sorted(answer)
    step = max(1.0, len(places) / MOST_PLACES)
    some = [places[int(at * step)] for at in range(min(len(places), MOST_PLACES))]
    return json.dumps({str(place): float(f"{answer[place]:.4g}") for place in some}, separators=(",", ":"))


def read_answer(text: str) -> Answer:
    """An answer from its JSON; an empty one if it is none."""
    try:
        return {int(place): float(number) for place, number in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def distance(first: Answer, other: Answer, fingerprint: str) -> float:
    """The length of their difference, as a part of that of `first`; at its places alone if only some are known."""
    places = {*first} if len(first) >= MOST_PLACES else {*first, *other}
    apart = hypot(*(first.get(place, 0.0) - other.get(place, 0.0) for place in places))
    return apart / max(hypot(*first.values()), _least(fingerprint))


def allowed(fingerprint: str) -> float:
    """The most distance between two workers of that fingerprint, which names the dtype."""
    return _FLOAT32 if " float32 " in f"{fingerprint} " else _OTHERS


def _least(fingerprint: str) -> float:
    scores = any(word in f"{fingerprint} " for word in _SCORES)
    return _LEAST_LOGITS[allowed(fingerprint)] if scores else _LEAST_LENGTH
