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
    """The Sentinels, each over its own client; asked in turn, the one first that answered last."""

    def __init__(self, sentinels: Sequence[redis.Redis]) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]
        self.sentinels = [*sentinels]
        # The library reorders its list at each answer, which threads at once would garble.
        self._turn = threading.Lock()

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Where the master is now. Raises MasterNotFoundError where none answers, or none calls it up."""
        with self._turn:
            return cast(tuple[str, int], super().discover_master(service_name))  # type: ignore[no-untyped-call]


class _MasterConnection(SentinelManagedConnection):
    def read_response(self, *args: Any, **options: Any) -> object:
        try:
            return super().read_response(*args, **options)
        except exceptions.ResponseError as error:
            # Redis 6.2 wraps the refusal of a command in a script, which the library then does not know.
            if "READONLY" in str(error):
                self.disconnect()  # type: ignore[no-untyped-call]
                raise exceptions.ConnectionError("The previous master is now a slave") from error
            raise


class _MasterTLSConnection(_MasterConnection, SentinelManagedSSLConnection):
    pass


def watchers(sentinels: Sequence[redis.Redis]) -> Watchers:
    """Sentinels to be shared by all clients of a process."""
    return Watchers(sentinels)


def master_client(watching: Watchers, master: str, url: str, settings: Mapping[str, object]) -> redis.Redis:
    """A client of the master that `watching` name; user, database and TLS as in `url`, whose address is not used."""
    wish = {**parse_url(url), **settings}  # type: ignore[no-untyped-call]
    kind = _MasterTLSConnection if wish.pop("connection_class", None) else _MasterConnection
    pool = SentinelConnectionPool(master, watching, connection_class=kind, **wish)  # type: ignore[no-untyped-call]
    client: redis.Redis = redis.Redis.from_pool(pool)
    return client
