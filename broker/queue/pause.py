"""Pauses a service: its workers finish the jobs that they hold, but claim no more until it is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import redis

from millstream.broker.contract.keys import ServiceKeys

_ACCEPTING, _REFUSING = b"accepting", b"refusing"


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause of a service. `refusing`: new jobs are refused. `left_ms`: time until it ends, None for no end."""

    refusing: bool = False
    left_ms: int | None = None


def pause(client: redis.Redis, keys: ServiceKeys, *, for_s: float | None = None, refusing: bool = False) -> None:
    """Pauses the service for `for_s` seconds, or until it is resumed if None. Replaces an earlier pause."""
    px = None if for_s is None else max(1, round(for_s * 1000))
    client.set(keys.paused(), _REFUSING if refusing else _ACCEPTING, px=px)


def resume(client: redis.Redis, keys: ServiceKeys) -> bool:
    """Ends the pause. Returns True if the service was paused."""
    return bool(client.delete(keys.paused()))


def find_pause(client: redis.Redis, keys: ServiceKeys) -> Pause | None:
    """Returns the pause of the service, None if it is not paused."""
    pipe = client.pipeline(transaction=False)
    queue_pause(pipe, keys)
    return read_pause(*pipe.execute())


def queue_pause(pipe: redis.client.Pipeline, keys: ServiceKeys) -> None:
    """Adds the two commands to `pipe` whose replies `read_pause` takes."""
    pipe.get(keys.paused())
    pipe.pttl(keys.paused())


def read_pause(value: object, left_ms: object) -> Pause | None:
    """Returns the pause, given the replies of GET and PTTL. The key may expire between the two: PTTL then gives -2."""
    ttl_ms = cast(int, left_ms)
    if value is None or ttl_ms == -2:
        return None
    return Pause(refusing=value == _REFUSING, left_ms=None if ttl_ms < 0 else ttl_ms)
