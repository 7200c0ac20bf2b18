"""Known texts, and what the model itself says of each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from millstream.broker.contract.job import Encoded, Vectors

CLOSE = 1e-5

_WORDS = ("mill", "water", "turns", "grain", "stone", "river", "bridge", "old", "rain", "wheel", "and", "slow")

TEXTS = [f"{number} {' '.join(_WORDS[: 1 + number % len(_WORDS)])}" for number in range(40)]


@dataclass(frozen=True)
class Reference:
    """`vectors[i]` is the vector of `TEXTS[i]`; `file` holds them for other processes."""

    vectors: Vectors
    file: Path

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(TEXTS)}

    def wrong(self, texts: Sequence[str], vectors: Encoded | None) -> bool:
        """Whether `vectors` are not those of `texts`."""
        expected = self.vectors[[self._rows[text] for text in texts]]
        return vectors is None or vectors.shape != expected.shape or bool(np.abs(vectors - expected).max() >= CLOSE)

    @classmethod
    def load(cls, file: Path) -> Reference:
        return cls(np.load(file), file)
