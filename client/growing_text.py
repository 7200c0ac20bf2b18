"""Text of a running job, put together from deltas that can come twice or be missing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import MutableSequence

from millstream.broker.contract.errors import StreamDiverged
from millstream.broker.contract.partial import Delta

MOST_PIECES = 128
"""Pieces that wait to be taken one by one. Later ones are joined, since the str of a word takes ten times its length.
"""

CHUNK = 1_024
"""Characters up to which pieces are joined."""


class GrowingText:
    """Pieces of a text, from its start and without gaps. Thread-safe: one thread adds deltas, another takes pieces.

    Offsets count code points. A delta that begins behind the end of the known text waits until `fill` gives the text
    between. If `fill` cannot, such deltas are dropped, and `finish` gives the rest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: deque[str] = deque()
        self._ahead: list[Delta] = []
        self._known = 0
        self._drops_ahead = False
        self._handed_out: list[str] = []

    @property
    def text(self) -> str:
        """The pieces that `take` has returned."""
        # Without the lock: a thread of the parent of a forked child may have held it.
        return "".join(self._handed_out)

    @property
    def has_news(self) -> bool:
        """Whether there is a piece to take, or a gap to fill."""
        return bool(self._pieces or self._ahead)

    @property
    def has_gap(self) -> bool:
        """Whether text between the known text and a delta is missing, and `fill` was not called for it."""
        return bool(self._ahead)

    def add(self, delta: Delta) -> bool:
        """Adds a delta. Returns whether `has_news` is now True because of it."""
        with self._lock:
            before = self._known
            if self._append(delta):
                self._append_ahead()
                return self._known > before
            if not self._drops_ahead:
                self._ahead.append(delta)
            return not self._drops_ahead

    def take(self) -> str:
        """Returns the next piece; "" if there is none."""
        with self._lock:
            if not self._pieces:
                return ""
            piece = self._pieces.popleft()
            _append(self._handed_out, piece)
            return piece

    def fill(self, text: str, offset: int = 0) -> None:
        """Closes a gap with `text`, the job's text so far as the server has it; it may be empty or too short.

        `offset` is the number of code points before `text`. Raises StreamDiverged if `text` is not a continuation of
        the text that was handed out.
        """
        with self._lock:
            known = self._joined()[offset:]
            if not (text.startswith(known) or known.startswith(text)):
                raise _diverged()
            self._append(Delta(offset, text))
            self._append_ahead()
            self._drops_ahead = bool(self._ahead)
            self._ahead.clear()

    def finish(self, text: str) -> None:
        """Replaces all that was not taken yet by the rest of `text`, the job's whole text.

        Raises StreamDiverged if `text` does not begin with the text that was handed out.
        """
        with self._lock:
            known = self._joined()
            if not text.startswith(known):
                raise _diverged()
            rest = text[len(known) :]
            self._pieces = deque([rest] if rest else [])
            self._known = len(text)
            self._ahead.clear()

    # -- under the lock ----------------------------------------------------------------------------------------

    def _append(self, delta: Delta) -> bool:
        """Appends the new part of a delta. Returns False if text before it is missing."""
        if delta.offset > self._known:
            return False
        if piece := delta.text[self._known - delta.offset :]:
            if len(self._pieces) < MOST_PIECES:
                self._pieces.append(piece)
            else:
                _append(self._pieces, piece)
            self._known += len(piece)
            self._drops_ahead = False
        return True

    def _append_ahead(self) -> None:
        if self._ahead:
            self._ahead = [delta for delta in sorted(self._ahead) if not self._append(delta)]

    def _joined(self) -> str:
        # Joined when it is compared, not at each piece: a long text has thousands of pieces.
        self._handed_out = ["".join(self._handed_out)]
        return self._handed_out[0]


def _append(pieces: MutableSequence[str], piece: str) -> None:
    """Appends `piece`, or joins it to the last of `pieces` if that is shorter than a chunk."""
    if pieces and len(pieces[-1]) < CHUNK:
        pieces[-1] += piece
    else:
        pieces.append(piece)


def _diverged() -> StreamDiverged:
    return StreamDiverged(
        "the job's text does not continue the text that was handed out",
        hint="two runs of the job generated different texts; drop this text and make the call again",
    )
