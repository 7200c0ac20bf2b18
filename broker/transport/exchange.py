"""Sends commands in one piece and reads their answers. Each job costs its client two such exchanges.

On a connection of one thread's own the library's client and pipeline are passed over: retries, metrics, callbacks and
locks, which such a connection does not need, cost about as much as the exchange itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from millstream.broker.transport.single_connection import SingleConnectionPool

Words = Sequence[str | bytes | int]
"""One command: its name in one word, and its arguments."""


def exchange(client: redis.Redis, *commands: Words) -> list[Any]:
    """The answer of each command, as the server gave it; its error if it refused, as a value.

    Nothing is sent again. Raises redis.ConnectionError and redis.TimeoutError.
    """
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SingleConnectionPool):
        return _exchange(pool, commands)
    # The client of a shared pool, of a Cluster, or of a test's fake server.
    pipe = client.pipeline(transaction=False)
    for words in commands:
        pipe.execute_command(*words)  # type: ignore[no-untyped-call]
    return list(pipe.execute(raise_on_error=False))


def _exchange(pool: SingleConnectionPool, commands: Sequence[Words]) -> list[Any]:
    connection = pool.get_connection()
    try:
        pieces = [piece for words in commands for piece in connection.pack_command(*words)]
        connection.send_packed_command(pieces if len(pieces) == 1 else [b"".join(pieces)])
        return [_answer(connection) for _ in commands]
    except BaseException:
        # Answers that were not read must not be taken for those of the next commands.
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.exceptions.ResponseError as refused:
        return refused
