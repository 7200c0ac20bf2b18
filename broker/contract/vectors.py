"""Vectors as a call asks for them: cut, normalized, encoded. Pure: workers and clients for tests use it."""

from __future__ import annotations

import numpy as np

from millstream.broker.contract.embedding import Encoding
from millstream.broker.contract.job import Encoded, Vectors

_LEAST_NORM = 1e-12


def shaped(vectors: Vectors, dimensions: int | None, normalize: bool, encoding: Encoding) -> Encoded:
    """Returns `vectors`, float32 [rows, dim], cut to `dimensions`, normalized if `normalize`, and encoded.

    The result is float32 or float16 [rows, dimensions]. For "binary" it is uint8 [rows, ceil(dimensions / 8)]: one bit
    for each number, 1 if it is above zero, the first number in the highest bit.
    """
    cut = vectors[:, :dimensions]
    if encoding == "binary":
        return np.packbits(cut > 0, axis=-1)
    # Numbers beyond float16 become infinity, which the worker's check of its results finds.
    with np.errstate(over="ignore", invalid="ignore"):
        if normalize:
            cut = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), _LEAST_NORM)
        return cut.astype(np.float16) if encoding == "float16" else cut
