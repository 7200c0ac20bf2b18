"""Batches on their way to the device. On CUDA from pinned memory, and the next one while the last one runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from millstream.worker.models.base import Prepared, Upcoming

Make = Callable[[Sequence[Prepared]], Mapping[str, torch.Tensor]]
"""Pads rows to the tensors that a forward takes, on the CPU."""


class Prefetch:
    """What one model's forwards take, on its device. Used by one thread.

    CUDA runs a forward by itself once it is launched. Between that and the wait for its results the next batch is made
    and sent after it; where `upcoming` was wrong about it, it is made again.
    """

    def __init__(self, device: torch.device, make: Make, backend: str = "torch") -> None:
        self._device = device
        self._make = make
        self._is_ahead = runs_by_itself(device, backend)
        self._upcoming: Upcoming | None = None
        self._next: tuple[Sequence[Prepared], dict[str, Any]] = [], {}

    def foresee(self, upcoming: Upcoming) -> None:
        if self._is_ahead:
            self._upcoming = upcoming

    def batch(self, rows: Sequence[Prepared]) -> dict[str, Any]:
        """The tensors of `rows`, on the device."""
        (expected, tensors), self._next = self._next, ([], {})
        # Rows are compared by identity.
        return tensors if list(expected) == list(rows) else self._sent(rows)

    def launched(self) -> None:
        """A forward runs, and nobody has asked for its results yet."""
        rows = self._upcoming() if self._upcoming else ()
        if not rows:
            return
        try:
            self._next = rows, self._sent(rows)
        except Exception:  # noqa: BLE001 - its own forward will meet the same, and this one has done nothing wrong
            self._next = [], {}

    def _sent(self, rows: Sequence[Prepared]) -> dict[str, Any]:
        return sent(self._make(rows), self._device)


def runs_by_itself(device: torch.device, backend: str) -> bool:
    """Whether a forward goes on there while its caller does something else."""
    return device.type == "cuda" and backend == "torch"


def sent(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """`tensors` on `device`. From pageable memory a copy to CUDA would wait for what runs there."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
