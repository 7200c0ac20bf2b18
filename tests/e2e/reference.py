"""Known texts, and what a model says of each of them alone: the real one, or one that echoes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from millstream.broker.contract.job import Encoded, Reply, Vectors

CLOSE = 1e-5

_WORDS = ("mill", "water", "turns", "grain", "stone", "river", "bridge", "old", "rain", "wheel", "and", "slow")

TEXTS = [f"{number} {' '.join(_WORDS[: 1 + number % len(_WORDS)])}" for number in range(40)]


class Answers(Protocol):
    """Knows the right answers. `name` tells other processes which these are: see `answers_of`."""

    @property
    def name(self) -> str: ...

    def wrong(self, texts: Sequence[str], answer: Any) -> bool:
        """Whether `answer`, a call's result, is not that of `texts`."""

    def wrong_reply(self, texts: Sequence[str], reply: Reply) -> bool:
        """Whether `reply` is not that of `texts`."""


class Echoes:
    """The answer of an echo service to a text is the text."""

    name = "echo"

    def wrong(self, texts: Sequence[str], answer: Any) -> bool:
        return bool(answer != list(texts))

    def wrong_reply(self, texts: Sequence[str], reply: Reply) -> bool:
        return self.wrong(texts, reply.values)


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

    def wrong_reply(self, texts: Sequence[str], reply: Reply) -> bool:
        return self.wrong(texts, reply.vectors)

    @property
    def name(self) -> str:
        return str(self.file)


def answers_of(name: str) -> Answers:
    """The answers of this name."""
    return Echoes() if name == Echoes.name else Reference(np.load(name), Path(name))
