"""Agreement of the results of two versions: how much of a call's answer a shadow gives, too. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import ResultKind
from millstream.client.generate import Generated
from millstream.client.result import Embeddings

Result = Embeddings | list[Json]
Floats = npt.NDArray[np.float64]


def agreement(kind: ResultKind, first: Result, other: Result) -> float:
    """Returns how much two results of one call agree, 1 for entirely; `kind` is that of the operation.

    It is the mean cosine of dense vectors, 0 if their shapes differ; the rank correlation of scores; for texts and
    other values the share of rows that are equal. Binary vectors have the share of equal bits. No rows agree.
    """
    if len(first) == 0 and len(other) == 0:
        return 1.0
    if isinstance(first, Embeddings) or isinstance(other, Embeddings):
        return _vectors(np.asarray(first), np.asarray(other))
    if len(first) != len(other):
        return 0.0
    if kind == "scores":
        return _rank_correlation(np.asarray(first, dtype=np.float64), np.asarray(other, dtype=np.float64))
    return sum(map(_are_equal, first, other)) / len(first)


def _vectors(first: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> float:
    if first.shape != other.shape or first.dtype != other.dtype:
        return 0.0
    if first.dtype == np.uint8:
        bits, others = (np.unpackbits(np.asarray(each, dtype=np.uint8)) for each in (first, other))
        return float(np.mean(bits == others))
    one, two = (np.asarray(each, dtype=np.float64) for each in (first, other))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    products = np.sum(one * two, axis=1)
    return float(np.mean(np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)))


def _rank_correlation(first: Floats, other: Floats) -> float:
    """Returns Spearman's rank correlation, with mean ranks for equal scores; 1 if there is nothing to order."""
    one, two = _ranks(first), _ranks(other)
    one, two = one - one.mean(), two - two.mean()
    lengths = float(np.sqrt(np.sum(one * one) * np.sum(two * two)))
    if not lengths:
        return float(bool(np.all(one == two)))
    return float(np.sum(one * two)) / lengths


def _ranks(scores: Floats) -> Floats:
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Floats = (last - (counts - 1) / 2)[places]
    return means


def _are_equal(one: object, two: object) -> bool:
    if isinstance(one, Generated) and isinstance(two, Generated):
        return one.text == two.text
    return one == two
