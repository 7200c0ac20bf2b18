"""What `embed` returns: an array that knows what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from millstream.broker.job import Vectors

Timings = Mapping[str, float]


class Embeddings(np.ndarray[Any, np.dtype[np.float32]]):
    """float32 [texts, dim], or [dim] for a single text.

    `usage["tokens"]` counts the tokens that ran, special ones included; `truncated` lists the texts that were cut;
    `timings` is in ms: `queue` and `inference` of the slowest job, `total` of the whole call.
    """

    usage: Mapping[str, int]
    truncated: tuple[int, ...]
    timings: Timings

    @classmethod
    def of(cls, vectors: Vectors, tokens: int, truncated: tuple[int, ...], timings: Timings) -> Embeddings:
        array = np.asarray(vectors, dtype=np.float32).view(cls)
        array.usage, array.truncated, array.timings = {"tokens": tokens}, truncated, timings
        return array

    def __array_finalize__(self, origin: object) -> None:
        self.usage = getattr(origin, "usage", {})
        self.truncated = getattr(origin, "truncated", ())
        self.timings = getattr(origin, "timings", {})
