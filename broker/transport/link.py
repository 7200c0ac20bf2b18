"""Sends commands over a connection that only one thread uses, past redis-py's client.

Each job costs its client two exchanges. Retries, metrics, callbacks and locks of the library's client and pipeline,
the check of the socket in its pool, and the check of each argument in its packer take more time than the exchange.
`benchmarks/bench_link.py` measures each of the three parts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import hiredis
import redis
from redis.connection import HiredisRespSerializer

IDLE_CHECK_S = 1.0
"""Idle time, in seconds, after which the connection is checked before the next command: a server may have closed it."""

Words = Sequence[str | bytes | int]
"""One command: its name as one word, then its arguments."""


def exchange(client: redis.Redis, *commands: Words) -> list[Any]:
    """Sends the commands in one write. Returns the raw answer of each, in order; the error of one that was refused.

    Nothing is sent again. Raises redis.ConnectionError or redis.TimeoutError if the exchange fails.
    """
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SingleConnectionPool):
        return exchange_over(pool, commands)
    # A shared pool, a Cluster, or the fake server of a test.
    pipe = client.pipeline(transaction=False)
    for words in commands:
        pipe.execute_command(*words)  # type: ignore[no-untyped-call]
    return list(pipe.execute(raise_on_error=False))


def exchange_over(pool: redis.ConnectionPool, commands: Sequence[Words]) -> list[Any]:
    """Does as `exchange`, without the library's client, over a connection of `pool`."""
    connection: Any = pool.get_connection()
    try:
        pieces = [piece for words in commands for piece in connection.pack_command(*words)]
        connection.send_packed_command(pieces if len(pieces) == 1 else [b"".join(pieces)])
        return [_answer(connection) for _ in commands]
    except BaseException:
        # Answers that were not read would be read as those of the next commands.
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.exceptions.ResponseError as refused:
        return refused


class SingleConnectionPool(redis.ConnectionPool):
    """A pool for one thread, which always gets the same connection.

    Before each command the library's pool takes a lock and checks whether the socket is still open. In this pool a
    broken connection shows as the command's error, after which the library opens it again. The library's own
    `single_connection_client` is no replacement: it connects when the client is made, also if the server is away, and
    its pipelines use the pool all the same.
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


class FastPacker(HiredisRespSerializer):
    """A packer for all connections; it has no state.

    The library's packer checks the type of each argument in Python, for two types that hiredis does not accept. A
    script call has hundreds of arguments, and checking them costs as much as packing them.
    """

    def pack(self, *words: Any) -> list[bytes]:
        """Returns the command as one piece. Raises DataError if a word is neither text, bytes nor a number."""
        name = words[0]
        # The library passes CONFIG GET as one word; the server expects two, so the library's packer splits it.
        if (" " if isinstance(name, str) else b" ") not in name:
            try:
                return [hiredis.pack_command(words)]
            except TypeError:
                pass
        packed: list[bytes] = super().pack(*words)
        return packed
