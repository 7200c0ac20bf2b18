"""Makes batches and copies them to the device. On CUDA it copies from pinned memory, while the last forward runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from millstream.worker.models.base import Prepared, Upcoming

Make = Callable[[Sequence[Prepared]], Mapping[str, torch.Tensor]]
"""Pads rows to the tensors that a forward takes, on the CPU."""


class Prefetch:
    """Makes the input tensors of one model's forwards, on its device. Used by one thread.

    CUDA runs a launched forward asynchronously. Before the thread waits for the results, it makes the next batch and
    queues its copy. If `upcoming` predicted other rows than the ones that come, the batch is made again.
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
        """Returns the tensors of `rows`, on the device."""
        (expected, tensors), self._next = self._next, ([], {})
        # Rows compare by identity.
        return tensors if list(expected) == list(rows) else self._make_on_device(rows)

    def make_next(self) -> None:
        """Makes the predicted next batch. Call it after a forward was launched, before its results are read."""
        rows = self._upcoming() if self._upcoming else ()
        if not rows:
            return
        try:
            self._next = rows, self._make_on_device(rows)
        except Exception:  # noqa: BLE001 - the next forward raises it again; the forward that runs now is not at fault
            self._next = [], {}

    def _make_on_device(self, rows: Sequence[Prepared]) -> dict[str, Any]:
        return to_device(self._make(rows), self._device)


def runs_by_itself(device: torch.device, backend: str) -> bool:
    """Returns whether a forward on that device and backend runs while its caller does something else."""
    return device.type == "cuda" and backend == "torch"


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Copies `tensors` to `device`. They are pinned for CUDA: a copy from pageable memory waits for running kernels."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
