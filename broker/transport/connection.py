"""Finds a process's Redis server, makes clients with our own timeouts, and checks the server's version."""

from __future__ import annotations

# Imported here, not at the first connection: a process forked during that import would wait for its lock for ever.
import encodings.idna  # noqa: F401
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import redis

from millstream.broker.config.data_dir import find_data_dir
from millstream.broker.config.url import ACCEPTED, canonical, read_url, redacted
from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import BrokerUnavailable, ConfigError
from millstream.broker.server.embedded import running
from millstream.broker.server.engine import FLOORS, EngineName, Version, floor_text, parse_version, version_text
from millstream.broker.transport.access import secured
from millstream.broker.transport.cluster import masters
from millstream.broker.transport.error_map import START_ONE, is_missing_group, is_transient, retrying, translated
from millstream.broker.transport.eviction import check_policy
from millstream.broker.transport.topology import opener

if TYPE_CHECKING:
    from millstream.broker.config.load import Config

__all__ = [
    "Connection",
    "ServerInfo",
    "check",
    "find_url",
    "is_missing_group",
    "is_transient",
    "redacted",
    "retrying",
    "translated",
]

_TIMEOUT_S = 5.0
"""Longest wait for the answer to a plain command, seconds."""

_BLOCK_GRACE_S = 3.0
"""Seconds that a blocking command may take beyond its block."""


class Connection:
    """The clients of one process to one server, Cluster or Sentinel master. Thread-safe and fork-safe.

    `url` is redis://, rediss:// (TLS) or unix://; or, with any number of hosts, redis+cluster://host:port,host:port or
    redis+sentinel://host:port,host:port/MASTER_NAME/db, both also with rediss. `name` shows in CLIENT LIST. Connects on
    first use. A forked child opens its own sockets. Raises ConfigError if `url` has none of these forms.
    """

    def __init__(self, url: str, *, name: str = "millstream") -> None:
        url = canonical(url)
        self.safe_url = redacted(url)
        try:
            self._place = read_url(url)
        except ValueError as problem:
            raise ConfigError(f"bad Redis URL {self.safe_url}: {problem}", hint=ACCEPTED) from None
        self.url = url
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._clients: list[redis.Redis] = []
        self._clients_within: dict[float, redis.Redis] = {}
        self._open = opener(self._place, self._name, self._clients.append)
        self.client = self._open(_TIMEOUT_S)
        """Client for plain commands. It never repeats a command by itself; use `retrying` if one may be repeated."""

    def blocking(self, block_s: float) -> redis.Redis:
        """Returns a client for commands that block for at most `block_s` seconds. Only one thread may use it."""
        return self._open(block_s + _BLOCK_GRACE_S, own=True)

    def own(self) -> redis.Redis:
        """Returns a client for one thread that sends many plain commands. No other thread may use it."""
        return self._open(_TIMEOUT_S, own=True)

    def within(self, timeout_s: float) -> redis.Redis:
        """Returns the client whose commands fail after `timeout_s` seconds. All threads share it."""
        client = self._clients_within.get(timeout_s)
        if client is None:
            # Two threads may both open one: the later one is not used, and closed with the others.
            client = self._clients_within.setdefault(timeout_s, self._open(timeout_s))
        return client

    def close(self) -> None:
        """Closes every socket. A thread that blocks on one gets an error at once."""
        for client in list(self._clients):
            client.close()

    def after_fork(self) -> None:
        """Makes new clients in a forked child. The parent's sockets stay open and unused here."""
        # Closing an inherited client could wait for ever: a thread of the parent may have held its pool's lock.
        for client in self._clients:
            client.auto_close_connection_pool = False
        self._begin()

    def __repr__(self) -> str:
        return f"Connection({self.safe_url!r})"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The engine and version of a server."""

    engine: EngineName
    version: Version


def check(connection: Connection, *, allow_eviction: bool = False) -> ServerInfo:
    """Returns the server's engine and version; in a Cluster, those of the oldest node that serves keys.

    Raises ConfigError if the server is too old, or if it deletes keys when its memory is full and `allow_eviction` is
    False. Raises BrokerUnavailable if it cannot be reached.
    """
    with translated(connection.safe_url):
        nodes = masters(connection.client)
        answers: list[Mapping[str, object]] = [node.info("server") for node in nodes]
        for node in nodes:
            check_policy(connection.safe_url, node, node.info("memory"), allow=allow_eviction)
    info = min(map(server_info, answers), key=lambda each: (each.version >= FLOORS[each.engine], each.version))
    if info.version < FLOORS[info.engine]:
        raise ConfigError(
            f"{connection.safe_url} is {info.engine} {version_text(info.version)}, which is too old",
            hint=f"{floor_text(info.engine)} is the oldest supported",
        )
    return info


def server_info(answer: Mapping[str, object]) -> ServerInfo:
    """Reads the answer to INFO. Valkey also gives a redis_version, the version of Redis that it forked from."""
    if "valkey_version" in answer:
        return ServerInfo("valkey", parse_version(str(answer["valkey_version"])))
    return ServerInfo("redis", parse_version(str(answer.get("redis_version", ""))))


def find_url(flag: str | None, config: Config | None, environ: Mapping[str, str]) -> str:
    """Returns the URL of the server to use.

    The first that is set: the flag, MILLSTREAM_REDIS_URL, `redis.url`, the local server that is running. Raises
    BrokerUnavailable if there is none, ConfigError if it is on another host without TLS and password.
    """
    configured = config.redis.url if config else None
    if named := flag or environ.get(URL_VARIABLE) or configured:
        return secured(named, config, environ)
    url = running(find_data_dir(None, config, environ))
    if not url:
        raise BrokerUnavailable("no Redis server is configured, and no local one is running", hint=START_ONE)
    return url
