"""A model's answer to a fixed text: its JSON, and the allowed distance between two workers' answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import hypot

Answer = Mapping[int, float]
"""Numbers by index: the elements of one vector, zeros may be missing, or one score for each text."""

_FIELD = "answer"

MOST_PLACES = 64
"""Most numbers of an answer that are stored, at even steps: supervisors read them with each heartbeat."""

_FLOAT32, _OTHERS = 0.01, 0.25
"""Allowed relative distance, in float32 and in other dtypes. Other kernels, threads and TF32 cause up to 0.001 in
float32; float16, bfloat16, or int8 on another CPU, up to 0.1. Vectors of other weights differ by 1 or more."""

_LEAST_LENGTH = 0.1
"""Smallest length that a distance is divided by: vectors may be cut, and cosines may be near zero."""

_LEAST_LOGITS = {_FLOAT32: 1.0, _OTHERS: 4.0}
"""Smallest length for logits, by allowed distance. A logit near zero is a sum of larger numbers: between 16 and 32
bfloat16 has steps of 0.125."""

_SCORES = (" cross-encoder ", " generative ")
"""Parts of the fingerprints of models whose answers are logits."""


def answer_field(fingerprint: str) -> str:
    """Returns the name of a service's field for the answer of the weights `fingerprint`.

    The name contains the fingerprint, so other weights are not compared with this answer: older versions of millstream
    delete the fingerprint and leave the answer.
    """
    return f"{_FIELD} {fingerprint}"


def is_answer(field: str) -> bool:
    """Tells if a field of a service holds an answer, of any weights."""
    return field.partition(" ")[0] == _FIELD


def encode_answer(answer: Answer) -> str:
    """Returns the answer as JSON: at most MOST_PLACES numbers, with 4 significant digits each."""
    places = sorted(answer)
    step = max(1.0, len(places) / MOST_PLACES)
    some = [places[int(at * step)] for at in range(min(len(places), MOST_PLACES))]
    return json.dumps({str(place): float(f"{answer[place]:.4g}") for place in some}, separators=(",", ":"))


def decode_answer(text: str) -> Answer:
    """Returns the answer that `text` encodes, or an empty one if `text` is malformed."""
    try:
        return {int(place): float(number) for place, number in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def distance(first: Answer, other: Answer, fingerprint: str) -> float:
    """Returns the length of the difference divided by the length of `first`.

    If `first` has MOST_PLACES numbers or more, some may not have been stored: only their indexes are compared.
    """
    places = {*first} if len(first) >= MOST_PLACES else {*first, *other}
    apart = hypot(*(first.get(place, 0.0) - other.get(place, 0.0) for place in places))
    return apart / max(hypot(*first.values()), _least(fingerprint))


def allowed_distance(fingerprint: str) -> float:
    """Returns the largest distance between two workers with this fingerprint, which names the dtype."""
    return _FLOAT32 if " float32 " in f"{fingerprint} " else _OTHERS


def _least(fingerprint: str) -> float:
    scores = any(word in f"{fingerprint} " for word in _SCORES)
    return _LEAST_LOGITS[allowed_distance(fingerprint)] if scores else _LEAST_LENGTH
