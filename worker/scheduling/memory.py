"""What a micro-batch that ran out of memory teaches: how much fits into one forward. Pure; knows no device."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.batcher import computed

_SIGNS = ("out of memory", "can't allocate memory", "failed to allocate memory", "alloc_failed")
"""How torch, ONNX Runtime and the libraries below them say it, in errors that are no type of their own."""


def is_exhaustion(error: BaseException) -> bool:
    """Whether a forward failed for want of memory, the host's or a device's."""
    # By name: nothing here imports torch, nor ONNX Runtime, whose RuntimeException is no RuntimeError.
    names = {cls.__name__ for cls in type(error).__mro__}
    untyped = not names.isdisjoint(("RuntimeError", "RuntimeException"))
    reports_it = untyped and any(sign in str(error).lower() for sign in _SIGNS)
    return "OutOfMemoryError" in names or isinstance(error, MemoryError) or reports_it


class Fit:
    """How the forwards over one micro-batch's rows fared, in tokens computed, by a model that `packs` or pads.

    `alone` counts rows that exhausted the memory by themselves. They say nothing of how much fits: a batch counts as
    too large only where each of its rows ran in the end.
    """

    def __init__(self, packs: bool = False) -> None:
        self.alone = 0
        self._packs = packs
        self._fitted: list[int] = []
        self._too_large: int | None = None

    def add_fitting(self, rows: Sequence[Prepared]) -> None:
        self._fitted.append(self._computed(rows))

    def add_too_large(self, rows: Sequence[Prepared]) -> None:
        """These ran out of memory together, and in parts they did not."""
        size = self._computed(rows)
        self._too_large = size if self._too_large is None else min(self._too_large, size)

    def rules_out(self, rows: Sequence[Prepared]) -> bool:
        """Whether a forward as large as that is known to fail."""
        return self._too_large is not None and len(rows) > 1 and self._computed(rows) >= self._too_large

    @property
    def most(self) -> int | None:
        """The largest forward that may be tried from now on; None where memory sufficed."""
        if self._too_large is None:
            return None
        return max((size for size in self._fitted if size < self._too_large), default=None)

    def _computed(self, rows: Sequence[Prepared]) -> int:
        return computed([row.tokens for row in rows], self._packs)
