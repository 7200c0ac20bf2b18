"""Custom models with weights of known sizes, for pools with less memory than all of them need."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

MB = 1_000_000


class Heavy:
    """Answers each payload with its own name. `size`: MB of weights, `work_s`: seconds of a payload in the model."""

    size = 1
    work_s = 0.002

    def __init__(self) -> None:
        self._weights = np.ones(self.size * MB // 8)

    def __call__(self, payloads: Sequence[object]) -> list[str]:
        until = time.perf_counter() + self.work_s * len(payloads)
        while time.perf_counter() < until:
            self._weights[:100].sum()
        return [f"{type(self).__name__} {payload}" for payload in payloads]


class Small(Heavy):
    size = 60


class Middle(Heavy):
    size = 80


class Large(Heavy):
    size = 100


class Broken(Heavy):
    """Cannot be loaded until the file named by BROKEN_UNTIL exists."""

    def __init__(self) -> None:
        raise RuntimeError("these weights are broken")


class Slow(Heavy):
    """Takes a fifth of a second for each payload."""

    size = 60
    work_s = 0.2
