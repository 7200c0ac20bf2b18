"""Facts about the Redis server itself: its memory, its disk, its clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.transport.cluster import masters
from millstream.broker.transport.connection import Connection, translated


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """One server, or one node of a Cluster that serves keys.

    `used_bytes` and `max_bytes` are of its memory; `max_bytes` is 0 if there is no limit. `policy` is its
    maxmemory-policy. `appends`: it writes each command to its disk (appendonly). `failed_write` names the last write to
    its disk that failed, "" if none did. `clock_ms` is how far this host's clock is ahead of the server's.
    """

    url: str
    used_bytes: int
    max_bytes: int
    policy: str
    appends: bool
    failed_write: str
    clock_ms: int


def read_server_facts(connection: Connection) -> Sequence[ServerFacts]:
    """Returns the facts of the server, or of each node that serves keys. Raises BrokerUnavailable."""
    facts = []
    with translated(connection.safe_url):
        for node in masters(connection.client):
            before = time.time()
            seconds, micros = node.time()
            clock_ms = round((before + time.time()) * 500) - seconds * 1000 - micros // 1000
            memory: Mapping[str, object] = node.info("memory")
            disk: Mapping[str, object] = node.info("persistence")
            facts.append(_facts(connection.safe_url, memory, disk, clock_ms))
    return facts


def _facts(url: str, memory: Mapping[str, object], disk: Mapping[str, object], clock_ms: int) -> ServerFacts:
    failed = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if disk.get(name, "ok") != "ok"]
    return ServerFacts(
        url=url,
        used_bytes=_number(memory.get("used_memory")),
        max_bytes=_number(memory.get("maxmemory")),
        policy=str(memory.get("maxmemory_policy", "")),
        appends=disk.get("aof_enabled") == 1,
        failed_write=failed[0] if failed else "",
        clock_ms=clock_ms,
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
