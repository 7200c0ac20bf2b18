"""Reads the index of a service with `fair`: jobs that wait, by tenant. lua/fair.lua says what lies there."""

from __future__ import annotations

from typing import cast

import redis

from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys


def oldest_indexed(client: redis.Redis, keys: ServiceKeys, priority: Priority, count: int) -> list[str]:
    """Returns the ids of the oldest jobs in the index, at most `count`, of the `count` tenants that are next."""
    tenants = cast(list[bytes], client.zrange(keys.turn(priority), 0, count - 1))
    pipe = client.pipeline(transaction=False)
    for tenant in tenants:
        first, last = b"[%s\0" % tenant, b"(%s\1" % tenant
        pipe.zrangebylex(keys.index(priority), first, last, start=0, num=count)
    members = [member for found in cast(list[list[bytes]], pipe.execute()) for member in found] if tenants else []
    ids = sorted(member.rpartition(b"\0")[2].decode() for member in members)
    return [_entry_id(each) for each in ids[:count]]


def count_before(client: redis.Redis, keys: ServiceKeys, priority: Priority, tenant: str, entry_id: str) -> int:
    """Returns how many jobs of its tenant are before an entry in the index."""
    ms, _, sequence = entry_id.partition("-")
    last = f"({tenant}\0{ms:>013}-{sequence:>010}"
    return int(client.zlexcount(keys.index(priority), f"[{tenant}\0", last))


def _entry_id(padded: str) -> str:
    ms, _, sequence = padded.partition("-")
    return f"{ms.lstrip('0') or '0'}-{sequence.lstrip('0') or '0'}"
