"""Finds stop strings in a text that comes in pieces, and holds back what may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    """The text that may be shown now, and whether a stop string ended the text."""

    text: str
    is_end: bool


class Stops:
    """The stop strings of one text. The text ends at the stop string that is complete first, and does not contain it.

    If several are complete at the same character, the longest counts. So it does not matter how the text was cut into
    pieces. Each stop string is matched by Knuth, Morris and Pratt's automaton: no character is read twice.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # The longest first: it is the first to be found complete.
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    @property
    def held(self) -> str:
        """The text held back: the longest end of the text that begins a stop string."""
        return self._held

    def feed(self, piece: str) -> Cut:
        """Adds a piece of the text. Not to be called again after the end."""
        if not self._stops:
            return Cut(piece, False)
        text = self._held + piece
        for at, character in enumerate(piece, len(self._held) + 1):
            for each, stop in enumerate(self._stops):
                length = self._advance(each, character)
                if length == len(stop):
                    self._held = ""
                    return Cut(text[: at - length], True)
        shown = len(text) - max(self._matched)
        self._held = text[shown:]
        return Cut(text[:shown], False)

    def end(self, tail: str) -> str:
        """Returns what is still to be shown if the text ends with `tail` for another reason. Changes nothing."""
        matched, held = list(self._matched), self._held
        cut = self.feed(tail)
        rest = cut.text if cut.is_end else cut.text + self._held
        self._matched, self._held = matched, held
        return rest

    def _advance(self, each: int, character: str) -> int:
        """Returns the number of characters of a stop string that the text ends with, after `character`."""
        stop, borders, length = self._stops[each], self._borders[each], self._matched[each]
        while length and stop[length] != character:
            length = borders[length - 1]
        if stop[length] == character:
            length += 1
        self._matched[each] = length
        return length


def _borders(stop: str) -> list[int]:
    """Returns for each beginning of `stop` the length of the longest shorter beginning that it ends with."""
    borders = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[length] != stop[at]:
            length = borders[length - 1]
        if stop[length] == stop[at]:
            length += 1
        borders[at] = length
    return borders
