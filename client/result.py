"""What calls return: an array, or a list, that knows what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from millstream.broker.contract.job import Encoded, Json

Timings = Mapping[str, float]


class Embeddings(np.ndarray[Any, np.dtype[Any]]):
    """float32 [texts, dim], or [dim] for a single text; float16, or uint8 with a bit for each number, where asked.

    `usage["tokens"]` counts the tokens that ran, special ones included; `truncated` lists the texts that were cut;
    `timings` is in ms: `queue` and `inference` of the slowest job, `total` of the whole call. `fingerprint` names the
    weights that made all of it: vectors of different fingerprints must not be compared. It is empty if not all workers
    said it.
    """

    usage: Mapping[str, int] = MappingProxyType({})
    truncated: tuple[int, ...] = ()
    timings: Timings = MappingProxyType({})
    fingerprint: str = ""

    @classmethod
    def of(
        cls, vectors: Encoded, tokens: int, truncated: tuple[int, ...], timings: Timings, fingerprint: str = ""
    ) -> Embeddings:
        array = vectors.view(cls)
        array.usage, array.truncated, array.timings = {"tokens": tokens}, truncated, timings
        array.fingerprint = fingerprint
        return array

    def __array_finalize__(self, origin: object) -> None:
        if isinstance(origin, Embeddings):
            self.usage, self.truncated, self.timings = origin.usage, origin.truncated, origin.timings
            self.fingerprint = origin.fingerprint


class Values(list[Json]):
    """One JSON value a row, for instance a reranker's scores; with what Embeddings tell of a call."""

    usage: Mapping[str, int] = MappingProxyType({})
    truncated: tuple[int, ...] = ()
    timings: Timings = MappingProxyType({})
    fingerprint: str = ""

    @classmethod
    def of(
        cls, values: Iterable[Json], tokens: int, truncated: tuple[int, ...], timings: Timings, fingerprint: str = ""
    ) -> Values:
        made = cls(values)
        made.usage, made.truncated, made.timings = {"tokens": tokens}, truncated, timings
        made.fingerprint = fingerprint
        return made
