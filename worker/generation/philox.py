"""Philox4x32-10: random numbers as a function of a key and a counter, without a state.

J. Salmon, M. Moraes, R. Dror, D. Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). The random number of a
token depends on the seed and the token's index alone, so a text that goes on elsewhere gets the numbers that it would
have got.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counters: ArrayLike, keys: ArrayLike) -> NDArray[np.uint32]:
    """Returns four random numbers of 32 bits for each row: uint32 [rows, 4].

    `counters` is uint32 [rows, 4], `keys` uint32 [rows, 2].
    """
    x0, x1, x2, x3 = np.asarray(counters, dtype=np.uint64).T
    k0, k1 = np.asarray(keys, dtype=np.uint64).T
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (p1 >> _HALF) ^ x1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack((x0, x1, x2, x3), axis=1).astype(np.uint32)


def uniforms(seeds: ArrayLike, indices: ArrayLike) -> NDArray[np.float64]:
    """Returns one number in (0, 1) for each row, both ends excluded: float64 [rows], of 52 random bits.

    The key is the seed, the counter the index of the token.
    """
    seed, index = np.asarray(seeds, dtype=np.uint64), np.asarray(indices, dtype=np.uint64)
    none = np.zeros_like(index)
    counters = np.stack((index & _LOW, index >> _HALF, none, none), axis=1)
    words = philox4x32(counters, np.stack((seed & _LOW, seed >> _HALF), axis=1)).astype(np.uint64)
    bits = (words[:, 0] << _HALF | words[:, 1]) >> np.uint64(12)
    return np.asarray((bits.astype(np.float64) + 0.5) * 2.0**-52)
