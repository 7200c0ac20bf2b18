"""A client's way to what its URL names: one server, a master that Sentinels name, or a Cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import redis
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry

from millstream.broker.config.url import Endpoint
from millstream.broker.transport.access import FilePassword, check_tls_files, split_password_file
from millstream.broker.transport.cluster import ClusterClient, Slots
from millstream.broker.transport.fast_packer import FastPacker
from millstream.broker.transport.sentinel import master_client, watchers
from millstream.broker.transport.single_connection import SingleConnectionPool

_CONNECT_TIMEOUT_S = 2.0
_ASK_TIMEOUT_S = 2.0
"""For one answer of one Sentinel, or of one node about the whole Cluster: another may be asked."""

_HEALTH_CHECK_S = 30
_MAX_CONNECTIONS = 1024
_PACKER = FastPacker()

# Without it every new connection sends two CLIENT SETINFO, which servers before 7.2 answer with an error.
_NO_SETINFO: dict[str, None] = (
    {"driver_info": None} if hasattr(redis, "driver_info") else {"lib_name": None, "lib_version": None}
)


class Open(Protocol):
    """Makes clients whose commands take at most `timeout_s`; `own` ones are used by one thread only."""

    def __call__(self, timeout_s: float, *, own: bool = False) -> redis.Redis: ...


def opener(endpoint: Endpoint, name: str, opened: Callable[[redis.Redis], None]) -> Open:
    """A function that makes clients.

    `opened` gets every client that has sockets, now or later, to close it. What is learned of the nodes is shared.
    Raises ConfigError where a file that the URL names cannot be used.
    """
    check_tls_files(endpoint.url)
    bare, password = split_password_file(endpoint.url)
    endpoint = replace(endpoint, url=bare)

    def one(
        url: str,
        timeout_s: float,
        password: FilePassword | None = password,
        pool: type[ConnectionPool] = ConnectionPool,
    ) -> redis.Redis:
        return redis.Redis.from_pool(pool.from_url(url, **_settings(url, name, timeout_s, password)))

    def kept(client: redis.Redis) -> redis.Redis:
        opened(client)
        return client

    if endpoint.kind == "single":
        return lambda timeout_s, own=False: kept(
            one(endpoint.url, timeout_s, pool=SingleConnectionPool if own else ConnectionPool)
        )
    if endpoint.kind == "sentinel":
        watching = watchers([one(endpoint.sentinel_url(each), _ASK_TIMEOUT_S, None) for each in endpoint.addresses])
        for watcher in watching.sentinels:
            opened(watcher)
        url = endpoint.node_url(endpoint.addresses[0])
        return lambda timeout_s, own=False: kept(
            master_client(watching, endpoint.master, url, _settings(url, name, timeout_s, password))
        )
    slots = Slots(endpoint.addresses, lambda address: one(endpoint.node_url(address), _ASK_TIMEOUT_S))
    return lambda timeout_s, own=False: ClusterClient(
        slots,
        lambda address: kept(one(endpoint.node_url(address), timeout_s)),
        endpoint.node_url(endpoint.addresses[0]),
    )


def _settings(url: str, name: str, timeout_s: float, password: FilePassword | None) -> dict[str, object]:
    # RESP2: the scripts' and XREADGROUP's answers keep one shape from Redis 6.2 to Valkey 9.
    # No retries: the library's own re-send writes, and wait ten times longer than a block.
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    return {
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": _HEALTH_CHECK_S,
        "max_connections": _MAX_CONNECTIONS,
        "client_name": name,
        "command_packer": _PACKER,
        **({"credential_provider": password} if password else {}),
        **keepalive,
        **_NO_SETINFO,
    }
