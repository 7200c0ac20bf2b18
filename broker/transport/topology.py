"""Makes clients for the servers that a URL names: one server, a master that Sentinels name, or a Cluster."""

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
from millstream.broker.transport.cluster import ClusterClient
from millstream.broker.transport.cluster_slots import Slots
from millstream.broker.transport.link import FastPacker, SingleConnectionPool
from millstream.broker.transport.sentinel import master_client, watchers

_CONNECT_TIMEOUT_S = 2.0
_ASK_TIMEOUT_S = 2.0
"""Longest wait, in seconds, for a Sentinel's answer or a node's slot layout. After that the next one is asked."""

_HEALTH_CHECK_S = 30
_MAX_CONNECTIONS = 1024
_PACKER = FastPacker()

# Without these settings every new connection sends two CLIENT SETINFO, which servers before 7.2 answer with an error.
_NO_SETINFO: dict[str, None] = (
    {"driver_info": None} if hasattr(redis, "driver_info") else {"lib_name": None, "lib_version": None}
)


class Open(Protocol):
    """Makes clients whose commands fail after `timeout_s` seconds. If `own`, only one thread may use the client."""

    def __call__(self, timeout_s: float, *, own: bool = False) -> redis.Redis: ...


def opener(endpoint: Endpoint, name: str, register: Callable[[redis.Redis], None]) -> Open:
    """Returns a function that makes clients.

    Calls `register` with every client that has sockets, also those of later nodes, so that the caller can close them.
    All clients share the knowledge about Sentinels and slots. Raises ConfigError if a file that the URL names cannot be
    used.
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

    def registered(client: redis.Redis) -> redis.Redis:
        register(client)
        return client

    if endpoint.kind == "single":
        return lambda timeout_s, own=False: registered(
            one(endpoint.url, timeout_s, pool=SingleConnectionPool if own else ConnectionPool)
        )
    if endpoint.kind == "sentinel":
        sentinels = watchers([one(endpoint.sentinel_url(each), _ASK_TIMEOUT_S, None) for each in endpoint.addresses])
        for sentinel in sentinels.sentinels:
            register(sentinel)
        url = endpoint.node_url(endpoint.addresses[0])
        return lambda timeout_s, own=False: registered(
            master_client(sentinels, endpoint.master, url, _settings(url, name, timeout_s, password))
        )
    slots = Slots(endpoint.addresses, lambda address: one(endpoint.node_url(address), _ASK_TIMEOUT_S))
    return lambda timeout_s, own=False: ClusterClient(
        slots,
        lambda address: registered(one(endpoint.node_url(address), timeout_s)),
        endpoint.node_url(endpoint.addresses[0]),
    )


def _settings(url: str, name: str, timeout_s: float, password: FilePassword | None) -> dict[str, object]:
    # RESP2: answers of scripts and of XREADGROUP have one shape from Redis 6.2 to Valkey 9.
    # No retries: the library's own repeat writes, and wait ten times longer than a block.
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
