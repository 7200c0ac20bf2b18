"""The server's clock, kept beside our own: deadlines are absolute times of the server."""

from __future__ import annotations

import time

TOLERANCE_MS = 100.0


class ServerClock:
    """Server ms, from its last word and our monotonic clock since. Reads and writes are single assignments."""

    def __init__(self) -> None:
        self._offset_ms = time.time() * 1000 - time.monotonic() * 1000

    def set_to(self, now_ms: int) -> None:
        self._offset_ms = now_ms - time.monotonic() * 1000

    def advance_to(self, now_ms: int) -> bool:
        """The same from an answer that may have lain unread: by now it is that late at least.

        False where that is much earlier than thought: it lay for so long, or the server's clock stepped back. Ask anew.
        """
        offset_ms = now_ms - time.monotonic() * 1000
        self._offset_ms = max(self._offset_ms, offset_ms)
        return offset_ms >= self._offset_ms - TOLERANCE_MS

    def now(self) -> int:
        return int(time.monotonic() * 1000 + self._offset_ms)
