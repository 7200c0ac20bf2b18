"""Decides what one forward computes: the next token of each growing text, and parts of prompts. Pure.

A prompt is computed in parts beside the texts that grow, so that their next tokens do not wait until a long prompt is
done. The parts of one forward are limited by the time that they may take, which is longer while many texts wait for
their first token and few grow. Of equally urgent prompts the shortest is computed first, since most texts then have
their first token earliest. A realtime prompt does not wait for less urgent texts: they are left out of its forwards, so
that its first token comes as soon as it would without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

MAX_STEP_MS = 100.0
"""Milliseconds that a forward with parts of prompts should take at most while texts grow and few wait."""

LEAST_PART, MOST_PART = 32, 2_048
"""Tokens of prompts in one forward, at least and at most: at least on a device that cannot keep MAX_STEP_MS."""

MOST_STRETCH = 3.0
"""Factor by which MAX_STEP_MS and LEAST_PART grow at most: if no text grows, or many more wait than grow."""

REALTIME = 0
"""Rank of realtime texts."""

WEIGHT = 0.3
"""Weight of the last forward in the mean time of growing texts."""

MEMORY_TOKENS = 512
"""Tokens of prompts in one forward after which the times of earlier forwards count half."""

MOST_OVER = 8
"""A prompt is computed whole rather than in two parts if the forward gets longer by at most one part in this number."""

MOST_PASSED = 8
"""Forwards with parts of other prompts that a prompt waits for. Then no shorter one of its class goes before it."""

MOST_LEFT_OUT = 4
"""Forwards in succession that may leave out less urgent texts. They have one in five even if prompts never end."""


class Text(Protocol):
    """A request in work: `length` tokens so far, `computed` of them in the cache, and the blocks that hold them.

    `passed`: number of forwards that had parts of other prompts and none of its own.
    """

    computed: int
    blocks: list[int]
    passed: int

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
    """Returns the pieces of the next forward: single tokens, by the number of blocks, then parts of prompts.

    The parts have about `part_tokens` tokens at most in all. Their order is by class, then the shortest prompt first.
    """
    growing = [Piece(text, text.computed, text.length) for text in texts if _missing(text) == 1]
    parts = _parts(sorted((text for text in texts if _missing(text) > 1), key=_turn), part_tokens, fills=bool(growing))
    growing += [each for each in parts if each.grows]
    growing.sort(key=lambda piece: len(piece.text.blocks))
    return growing + [each for each in parts if not each.grows]


def _parts(prompts: Sequence[Text], tokens: int, *, fills: bool) -> list[Piece]:
    """Returns parts of `prompts` that have about `tokens` tokens.

    Unless `fills`, a prompt is not begun beside others that are completed: their first tokens would only come later.
    """
    parts: list[Piece] = []
    over = tokens // MOST_OVER
    for text in prompts:
        missing = _missing(text)
        if missing > tokens and (missing > 2 * tokens or missing > tokens + over):
            if parts and not fills:
                break
            missing = tokens
        if missing <= 0:
            break
        tokens -= missing
        parts.append(Piece(text, text.computed, text.computed + missing))
    return parts


def _missing(text: Text) -> int:
    return text.length - text.computed


def _turn(text: Text) -> tuple[int, int]:
    return text.rank, 0 if text.passed >= MOST_PASSED else _missing(text)


def waiting(texts: Sequence[Text]) -> int:
    """Returns how many texts wait for a prompt to be computed, without those less urgent than a text that grows."""
    most = min((text.rank for text in texts if _missing(text) == 1), default=None)
    return sum(_missing(text) > 1 and (most is None or text.rank <= most) for text in texts)


def note_passed(texts: Sequence[Text], pieces: Sequence[Piece]) -> None:
    """Counts a forward for each of `texts` that has a prompt to compute, but none of `pieces`."""
    served = {id(piece.text) for piece in pieces}
    for text in texts:
        if _missing(text) > 1 and id(text) not in served:
            text.passed += 1


@dataclass(slots=True)
class PartSize:
    """Tokens of prompts for the next forward, by the time that past forwards took. `most` limits them.

    `growing_s`: mean time of a forward over growing texts alone. `texts`: their mean number. `parts_s` and
    `part_tokens`: weighted sums of the times that parts took, and of their tokens.
    """

    most: int = MOST_PART
    growing_s: float = 0.0
    texts: float = 1.0
    parts_s: float = 0.0
    part_tokens: float = 0.0

    @property
    def token_s(self) -> float:
        """Mean seconds that a token of a prompt takes; 0.0 until it is measured."""
        return self.parts_s / self.part_tokens if self.part_tokens else 0.0

    def tokens(self, growing: int, waiting: int = 0) -> int:
        """Returns the tokens of prompts that may be computed beside `growing` texts, while `waiting` prompts wait."""
        if not self.part_tokens:
            return min(self.most, LEAST_PART if growing else 4 * LEAST_PART)
        # A longer forward delays the texts that grow, and brings those that wait their first token.
        stretch = min(1 + waiting / growing, MOST_STRETCH) if growing else MOST_STRETCH
        spare_s = stretch * MAX_STEP_MS / 1000 - self._growing_s(growing)
        return min(self.most, max(int(stretch * LEAST_PART), int(spare_s / self.token_s)))

    def observe(self, growing: int, part_tokens: int, seconds: float) -> None:
        """Notes the time of a forward over `growing` single tokens and `part_tokens` tokens of prompts."""
        if not part_tokens:
            self.texts = self.texts + WEIGHT * (growing - self.texts) if self.growing_s else growing
            self.growing_s += WEIGHT * (seconds - self.growing_s) if self.growing_s else seconds
            return
        # By tokens, not by forwards: short parts show the fixed cost of a forward rather than that of a token.
        memory = MEMORY_TOKENS / (MEMORY_TOKENS + part_tokens)
        self.parts_s = memory * self.parts_s + max(seconds - self._growing_s(growing), 1e-9)
        self.part_tokens = memory * self.part_tokens + max(part_tokens, LEAST_PART)

    def _growing_s(self, growing: int) -> float:
        """Part of a forward's time that is due to `growing` texts: rather too short, so that parts are not too long."""
        return self.growing_s * min(1.0, growing / self.texts)
