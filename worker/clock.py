"""The server's clock, kept beside our own: deadlines are absolute times of the server."""

from __future__ import annotations

import time


class ServerClock:
    """Server ms, from its last word and our monotonic clock since. Reads and writes are single assignments."""

    def __init__(self) -> None:
        self._offset_ms = time.time() * 1000 - time.monotonic() * 1000

    def heard(self, now_ms: int) -> None:
        self._offset_ms = now_ms - time.monotonic() * 1000

    def heard_late(self, now_ms: int) -> None:
        """The same from an answer that may have lain unread: by now it is that late at least."""
        self._offset_ms = max(self._offset_ms, now_ms - time.monotonic() * 1000)

    def now(self) -> int:
        return int(time.monotonic() * 1000 + self._offset_ms)
