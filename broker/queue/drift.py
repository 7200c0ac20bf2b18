"""Vectors of fixed texts that a service gave once, to see a changed model behind the same name.

A fingerprint names files. It cannot show that a server which runs elsewhere has another model now, and it changes with
a library that computes the same. So what is kept does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import redis

from millstream.broker.contract.answer import allowed_distance
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.diagnosis import Finding
from millstream.broker.queue.figure_text import iso_time
from millstream.broker.transport.cluster import owner

TEXTS = (
    "The mill turns in the stream, 24 hours a day: who grinds the corn?",
    "Wasser",
    "def f(x): return x + 1",
    "水车在河里转动。",
)
"""The fixed texts. Other texts would make all kept vectors useless."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Vectors of TEXTS, float32 [len(TEXTS), dim], the fingerprint of the weights, and when they were kept, ms."""

    vectors: Floats
    fingerprint: str
    at: int


def read_baseline(client: redis.Redis, keys: ServiceKeys) -> Baseline | None:
    """Returns the vectors that were kept of a service; None if there are none. Raises redis.RedisError."""
    found = cast(Mapping[bytes, bytes], client.hgetall(keys.drift()))
    try:
        vectors = np.frombuffer(found[b"vectors"], dtype="<f4").reshape(len(TEXTS), -1)
        return Baseline(vectors, found[b"fingerprint"].decode(), int(found[b"at"]))
    except (KeyError, ValueError):
        return None


def keep(client: redis.Redis, keys: ServiceKeys, vectors: Floats, fingerprint: str) -> None:
    """Keeps these vectors of a service instead of earlier ones. Raises redis.RedisError."""
    seconds, micros = owner(client, keys.drift()).time()
    at = int(seconds) * 1000 + int(micros) // 1000
    data = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    client.hset(keys.drift(), mapping={"vectors": data, "fingerprint": fingerprint, "at": at})


def diagnose_drift(service: str, baseline: Baseline, vectors: Floats, fingerprint: str) -> Finding | None:
    """Returns what has changed in the vectors of a service since some were kept; None if nothing has. Pure.

    The allowed distance is that of two workers with one fingerprint: kernels and devices differ by less.
    """
    how = _describe(baseline.vectors, vectors, allowed_distance(baseline.fingerprint))
    if not how:
        return None
    weights = f"the weights were {baseline.fingerprint}, and are {fingerprint}"
    if baseline.fingerprint == fingerprint:
        weights = f"the fingerprint of the weights is the same: {fingerprint}"
    return Finding(
        "warning",
        service,
        "drift",
        f"its vectors have changed since {iso_time(baseline.at)}: {how}; {weights}",
        "compute stored vectors again, or run the earlier model; millstream doctor --drift --accept keeps those of now",
    )


def _describe(baseline: Floats, vectors: Floats, allowed: float) -> str:
    """Returns how two arrays of vectors differ, "" if by no more than `allowed` of their length."""
    if baseline.shape != vectors.shape:
        return f"they had {baseline.shape[-1]} dimensions, and have {vectors.shape[-1]}"
    one, two = baseline.astype(np.float64), vectors.astype(np.float64)
    lengths = np.maximum(np.linalg.norm(one, axis=1), 1e-9)
    distances = np.linalg.norm(one - two, axis=1) / lengths
    if float(distances.max()) <= allowed:
        return ""
    cosines = np.sum(one * two, axis=1) / (lengths * np.maximum(np.linalg.norm(two, axis=1), 1e-9))
    return f"the cosine of a fixed text's vectors is {float(cosines.min()):.3f}"
