"""The server's clock, estimated by the local one: deadlines are absolute times of the server."""

from __future__ import annotations

import time

TOLERANCE_MS = 100.0
"""Milliseconds that an answer may be behind the estimate before the server's time has to be asked anew."""


class ServerClock:
    """Server time in ms: its last known value plus the local monotonic time since. Lock-free: accesses are atomic."""

    def __init__(self) -> None:
        self._offset_ms = time.time() * 1000 - time.monotonic() * 1000

    def set_to(self, now_ms: int) -> None:
        """Sets the clock by a reply that was read at once."""
        self._offset_ms = now_ms - time.monotonic() * 1000

    def advance_to(self, now_ms: int) -> bool:
        """Advances the clock by a reply that may have been read late: it is at least `now_ms` now. Never sets it back.

        Returns False if `now_ms` is more than TOLERANCE_MS behind the estimate: either the reply was read late, or the
        clock of the server stepped back. The caller should then ask the server for its time.
        """
        offset_ms = now_ms - time.monotonic() * 1000
        self._offset_ms = max(self._offset_ms, offset_ms)
        return offset_ms >= self._offset_ms - TOLERANCE_MS

    def now(self) -> int:
        return int(time.monotonic() * 1000 + self._offset_ms)
