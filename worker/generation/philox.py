"""Philox4x32-10: random numbers as a function of a key and a counter, without a state.

J. Salmon, M. Moraes, R. Dror, D. Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). The random number of a
token depends on the seed and the token's index alone, so a text that goes on elsewhere gets the numbers that it would
have got.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counters: ArrayLike, keys: ArrayLike) -> NDArray[np.uint32]:
    """Returns four random numbers of 32 bits for each row: uint32 [rows, 4].

    `counters` is uint32 [rows, 4], `keys` uint32 [rows, 2].
    """
    words = np.asarray(counters, dtype=np.uint64).T
    key = np.asarray(keys, dtype=np.uint64).T
    # Both halves of a round at once: words 0 and 2, and words 1 and 3.
    even, odd = words[0::2], words[1::2]
    for _ in range(_ROUNDS):
        products = even * _MULTIPLIERS
        even, odd = (products >> _HALF)[::-1] ^ odd ^ key, (products & _LOW)[::-1]
        key = (key + _KEY_STEPS) & _LOW
    return np.stack((even[0], odd[0], even[1], odd[1]), axis=1).astype(np.uint32)


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
