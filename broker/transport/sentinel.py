"""A client that asks Sentinels for the master at each new connection, and leaves a master that became a replica."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import redis
from redis import exceptions
from redis.connection import parse_url
from redis.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)


class Watchers(Sentinel):
    """The Sentinels, each with its own client. They are asked in turn, starting with the one that last answered."""

    def __init__(self, sentinels: Sequence[redis.Redis]) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]
        self.sentinels = [*sentinels]
        # The library reorders its list at each answer, which concurrent threads would corrupt.
        self._turn = threading.Lock()

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Returns the master's current host and port.

        Raises MasterNotFoundError if no Sentinel answers, or if none reports the master as up.
        """
        with self._turn:
            return cast(tuple[str, int], super().discover_master(service_name))  # type: ignore[no-untyped-call]


class _MasterConnection(SentinelManagedConnection):
    def read_response(self, *args: Any, **options: Any) -> object:
        try:
            return super().read_response(*args, **options)
        except exceptions.ResponseError as error:
            # Redis 6.2 wraps READONLY in a script's error, which the library does not recognize.
            if "READONLY" in str(error):
                self.disconnect()  # type: ignore[no-untyped-call]
                raise exceptions.ConnectionError("The previous master is now a slave") from error
            raise


class _MasterTLSConnection(_MasterConnection, SentinelManagedSSLConnection):
    pass


def watchers(sentinels: Sequence[redis.Redis]) -> Watchers:
    """Returns Sentinels that all clients of a process share."""
    return Watchers(sentinels)


def master_client(sentinels: Watchers, master: str, url: str, settings: Mapping[str, object]) -> redis.Redis:
    """Returns a client of the master that `sentinels` name. Only user, database and TLS are read from `url`."""
    options = {**parse_url(url), **settings}  # type: ignore[no-untyped-call]
    kind = _MasterTLSConnection if options.pop("connection_class", None) else _MasterConnection
    pool = SentinelConnectionPool(master, sentinels, connection_class=kind, **options)  # type: ignore[no-untyped-call]
    client: redis.Redis = redis.Redis.from_pool(pool)
    return client
