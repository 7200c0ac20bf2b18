"""Pausing a service: while the pause lasts its workers claim nothing, and what they hold they finish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import redis

from millstream.broker.contract.keys import ServiceKeys

_ACCEPTING, _REFUSING = b"accepting", b"refusing"


@dataclass(frozen=True, slots=True)
class Pause:
    """A service that is paused. `refusing`: it takes no new jobs either. `left_ms`: until it ends by itself, if so."""

    refusing: bool = False
    left_ms: int | None = None


def pause(client: redis.Redis, keys: ServiceKeys, *, for_s: float | None = None, refusing: bool = False) -> None:
    """Pause the service, for `for_s` seconds or until it is resumed. A pause before this one ends."""
    px = None if for_s is None else max(1, round(for_s * 1000))
    client.set(keys.paused(), _REFUSING if refusing else _ACCEPTING, px=px)


def resume(client: redis.Redis, keys: ServiceKeys) -> bool:
    """Let its workers claim again; whether it was paused."""
    return bool(client.delete(keys.paused()))


def find_pause(client: redis.Redis, keys: ServiceKeys) -> Pause | None:
    """The pause that lasts, if there is one."""
    pipe = client.pipeline(transaction=False)
    queue_pause(pipe, keys)
    return read_pause(*pipe.execute())


def queue_pause(pipe: redis.client.Pipeline, keys: ServiceKeys) -> None:
    """Add the two commands to `pipe` whose answers `read_pause` takes."""
    pipe.get(keys.paused())
    pipe.pttl(keys.paused())


def read_pause(value: object, left_ms: object) -> Pause | None:
    """What GET and PTTL say of the key; between the two it may have expired."""
    left = cast(int, left_ms)
    if value is None or left == -2:
        return None
    return Pause(refusing=value == _REFUSING, left_ms=None if left < 0 else left)
