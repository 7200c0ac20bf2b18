"""A connection of one thread's own, without what a shared pool costs before each command."""

from __future__ import annotations

import time
from typing import Any

import redis

LOOK_OVER_S = 1.0
"""After so long without a command the connection is looked over before the next one: a server may have closed it."""


class SingleConnectionPool(redis.ConnectionPool):
    """The pool of one thread: it hands out the same connection again and again.

    The library's pool takes a lock and asks the socket whether it is still good before each command. These are a third
    of what a command costs, and in a process with many threads two more turns at the interpreter's lock. Here a broken
    connection shows as the command's error, after which the library opens it again.
    """

    _own: Any = None
    _used_at = 0.0

    def get_connection(self, command_name: str | None = None, *keys: object, **options: object) -> Any:
        now = time.monotonic()
        if self._own is None or now - self._used_at > LOOK_OVER_S:
            if self._own is not None:
                super().release(self._own)
            # Looked over, as ever.
            self._own = None
            self._own = super().get_connection()
        self._used_at = now
        return self._own

    def release(self, connection: Any) -> None:
        """Keep it; but one that could not be opened is given up."""
        if connection is self._own:
            self._used_at = time.monotonic()
        else:
            super().release(connection)
