"""Sends commands in one write and reads their answers. Each job costs its client two such exchanges.

A connection that only one thread uses bypasses the library's client and pipeline. Such a connection needs none of their
retries, metrics, callbacks and locks, which cost about as much time as the exchange itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from millstream.broker.transport.single_connection import SingleConnectionPool

Words = Sequence[str | bytes | int]
"""One command: its name as one word, then its arguments."""


def exchange(client: redis.Redis, *commands: Words) -> list[Any]:
    """Returns the raw answer of each command, in order. A command that the server refused has its error as answer.

    Nothing is sent again. Raises redis.ConnectionError or redis.TimeoutError if the exchange fails.
    """
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SingleConnectionPool):
        return _exchange(pool, commands)
    # A shared pool, a Cluster, or the fake server of a test.
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
