"""A connection for one thread, without the cost of a shared pool before each command."""

from __future__ import annotations

import time
from typing import Any

import redis

IDLE_CHECK_S = 1.0
"""Idle time, in seconds, after which the connection is checked before the next command: a server may have closed it."""


class SingleConnectionPool(redis.ConnectionPool):
    """A pool for one thread, which always gets the same connection.

    Before each command the library's pool takes a lock and checks whether the socket is still open. That is a third of
    the cost of a command, and with many threads it takes the interpreter's lock two more times. In this pool a broken
    connection shows as the command's error, after which the library opens it again.
    """

    _own: Any = None
    _used_at = 0.0

    def get_connection(self, command_name: str | None = None, *keys: object, **options: object) -> Any:
        now = time.monotonic()
        if self._own is None or now - self._used_at > IDLE_CHECK_S:
            if self._own is not None:
                super().release(self._own)
            # The library's pool checks the connection here.
            self._own = None
            self._own = super().get_connection()
        self._used_at = now
        return self._own

    def release(self, connection: Any) -> None:
        """Keeps the connection; one that could not be opened goes back to the library's pool."""
        if connection is self._own:
            self._used_at = time.monotonic()
        else:
            super().release(connection)
