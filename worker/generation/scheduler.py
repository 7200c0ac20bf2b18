"""Decides what one forward computes: the next token of each growing text, and parts of prompts. Pure.

A prompt is computed in parts beside the texts that grow, so that their next tokens do not wait until a long prompt is
done. The parts of one forward are limited by the time that they may take. A realtime prompt does not wait for less
urgent texts: they are left out of its forwards, so that its first token comes as soon as it would without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

MAX_STEP_MS = 100.0
"""Milliseconds that a forward with parts of prompts should take at most while texts grow."""

MAX_PREFILL_MS = 1_000.0
"""Milliseconds that it should take at most if no text grows."""

LEAST_PART, MOST_PART = 32, 2_048
"""Tokens of prompts in one forward, at least and at most."""

REALTIME = 0
"""Rank of realtime texts."""

WEIGHT = 0.3
"""Weight of the last forward in the mean times."""


MOST_LEFT_OUT = 4
"""Forwards in succession that may leave out less urgent texts. They have one in five even if prompts never end."""


class Text(Protocol):
    """A request in work: `length` tokens so far, `computed` of them in the cache, and the blocks that hold them."""

    computed: int
    blocks: list[int]

    @property
    def length(self) -> int: ...

    @property
    def rank(self) -> int:
        """Position of its class in PRIORITIES; less for a text that runs before all classes."""
        ...


T = TypeVar("T", bound=Text)


class Piece(NamedTuple):
    """Tokens `first` to `end` of one text, to be computed now."""

    text: Text
    first: int
    end: int

    @property
    def gives_token(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.end == self.text.length

    @property
    def grows(self) -> bool:
        """Whether it is one token: then it runs together with other texts'."""
        return self.end - self.first == 1


def before_others(texts: Sequence[T]) -> list[T]:
    """Returns the realtime texts, and those that run before all classes, if one of them has a prompt to compute.

    Returns all texts if none has.
    """
    urgent = [text for text in texts if text.rank <= REALTIME]
    return urgent if any(text.length - text.computed > 1 for text in urgent) else list(texts)


def plan(texts: Sequence[Text], part_tokens: int) -> list[Piece]:
    """Returns the pieces of the next forward: single tokens, by the number of blocks, then parts in order of `texts`.

    The parts have `part_tokens` tokens at most in all.
    """
    growing, parts = [], []
    for text in texts:
        missing = text.length - text.computed
        if missing == 1:
            growing.append(Piece(text, text.computed, text.length))
        elif part_tokens > 0:
            tokens = min(missing, part_tokens)
            part_tokens -= tokens
            parts.append(Piece(text, text.computed, text.computed + tokens))
    growing += [each for each in parts if each.grows]
    growing.sort(key=lambda piece: len(piece.text.blocks))
    return growing + [each for each in parts if not each.grows]


@dataclass(slots=True)
class PartSize:
    """Tokens of prompts for the next forward, by the time that past forwards took. `most` limits them.

    `growing_s`: mean time of a forward over growing texts alone. `texts`: their mean number.
    """

    most: int = MOST_PART
    growing_s: float = 0.0
    texts: float = 1.0
    token_s: float = 0.0

    def tokens(self, growing: int) -> int:
        """Returns the tokens of prompts that may be computed beside `growing` texts."""
        limit_s = (MAX_STEP_MS if growing else MAX_PREFILL_MS) / 1000
        if not self.token_s:
            return min(self.most, LEAST_PART if growing else 4 * LEAST_PART)
        spare_s = limit_s - self._growing_s(growing)
        return max(min(LEAST_PART, self.most), min(self.most, int(spare_s / self.token_s)))

    def observe(self, growing: int, part_tokens: int, seconds: float) -> None:
        """Notes the time of a forward over `growing` single tokens and `part_tokens` tokens of prompts."""
        if not part_tokens:
            self.texts = self.texts + WEIGHT * (growing - self.texts) if self.growing_s else growing
            self.growing_s += WEIGHT * (seconds - self.growing_s) if self.growing_s else seconds
            return
        # Short parts show the fixed cost of a forward rather than that of a token.
        token_s = max(seconds - self._growing_s(growing), 1e-9) / max(part_tokens, LEAST_PART)
        self.token_s += WEIGHT * (token_s - self.token_s) if self.token_s else token_s

    def _growing_s(self, growing: int) -> float:
        """Part of a forward's time that is due to `growing` texts: rather too short, so that parts are not too long."""
        return self.growing_s * min(1.0, growing / self.texts)
