"""Finds how many tokens fit into one forward, from micro-batches that ran out of memory. Pure; knows no device."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.batcher import computed

_SIGNS = ("out of memory", "can't allocate memory", "failed to allocate memory", "alloc_failed")
"""Parts of the messages with which torch, ONNX Runtime and the libraries below them report it in general errors."""


def is_exhaustion(error: BaseException) -> bool:
    """Whether a forward failed for lack of memory of the host or of a device."""
    # By name: this imports neither torch nor ONNX Runtime, whose RuntimeException is no RuntimeError.
    names = {cls.__name__ for cls in type(error).__mro__}
    untyped = not names.isdisjoint(("RuntimeError", "RuntimeException"))
    reports_it = untyped and any(sign in str(error).lower() for sign in _SIGNS)
    return "OutOfMemoryError" in names or isinstance(error, MemoryError) or reports_it


class Fit:
    """Sizes of the forwards over one micro-batch's rows, in computed tokens; the model `packs` its rows, or pads them.

    `alone` counts rows that exhausted the memory by themselves. They do not show how much fits: a batch counts as too
    large only if each of its rows ran in the end.
    """

    def __init__(self, packs: bool = False) -> None:
        self.alone = 0
        self._packs = packs
        self._fitted: list[int] = []
        self._too_large: int | None = None

    def add_fitting(self, rows: Sequence[Prepared]) -> None:
        """Notes that a forward over `rows` fitted into memory."""
        self._fitted.append(self._computed(rows))

    def add_too_large(self, rows: Sequence[Prepared]) -> None:
        """Notes that `rows` ran out of memory together, and did not in parts."""
        size = self._computed(rows)
        self._too_large = size if self._too_large is None else min(self._too_large, size)

    def rules_out(self, rows: Sequence[Prepared]) -> bool:
        """Whether a forward over `rows` is known to fail."""
        return self._too_large is not None and len(rows) > 1 and self._computed(rows) >= self._too_large

    @property
    def most(self) -> int | None:
        """The largest forward that fits, in tokens; None if none ran out of memory, or if none fitted."""
        if self._too_large is None:
            return None
        return max((size for size in self._fitted if size < self._too_large), default=None)

    def _computed(self, rows: Sequence[Prepared]) -> int:
        return computed([row.tokens for row in rows], self._packs)
