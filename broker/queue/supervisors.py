"""State of the supervisors of a service, which they publish every second and remove when they end in order.

One that was killed leaves its state: so an operator can see that it ended, and how its workers did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import redis

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.lease import is_live

KEPT_S = 86_400
"""Seconds for which the state of a supervisor is kept after any supervisor of the service has published."""

_MOST_TEXT = 1_000


@dataclass(frozen=True, slots=True)
class SupervisorState:
    """State of one supervisor's workers of one service.

    `planned` and `ready` count worker processes. `failures` is the largest number of workers of one place that ended
    early in a row, `past` how the last of them ended. `refused` says why no worker is started any more, "" if they are.
    `unloaded` says why a process of a pool cannot load the model, "" if it can. `cores` is the number of CPU cores that
    it may use. `drained` counts the places that an operator keeps
    empty, or that are being emptied.
    """

    host: str
    pid: int
    planned: int
    ready: int
    failures: int = 0
    past: str = ""
    refused: str = ""
    cores: int = 0
    drained: int = 0
    unloaded: str = ""


@dataclass(frozen=True, slots=True)
class SupervisorView:
    """The last state of a supervisor. `age_ms`: time since it was published, by the server's clock.

    `clock_ms` is how far its host's clock is ahead of the server's.
    """

    state: SupervisorState
    age_ms: int
    clock_ms: int

    @property
    def lives(self) -> bool:
        """Whether it has published within a lease."""
        return is_live(0, self.age_ms)


class Supervisors:
    """The supervisors of one service, over one client."""

    def __init__(self, client: redis.Redis, keys: ServiceKeys) -> None:
        self._client = client
        self._key = keys.supervisors()

    def publish(self, state: SupervisorState) -> None:
        """Stores the state of a supervisor, which replaces its last one."""
        seconds, micros = self._client.time()
        now = seconds * 1000 + micros // 1000
        cut = {name: value[:_MOST_TEXT] if isinstance(value, str) else value for name, value in asdict(state).items()}
        text = json.dumps(cut | {"at": now, "clock_ms": round(time.time() * 1000) - now})
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(self._key, _field(state.host, state.pid), text)
        pipe.pexpire(self._key, KEPT_S * 1000)
        pipe.execute()

    def remove(self, host: str, pid: int) -> None:
        """Removes the state of a supervisor that ends in order."""
        self._client.hdel(self._key, _field(host, pid))


def queue_supervisors(pipe: redis.client.Pipeline, keys: ServiceKeys) -> None:
    """Adds the command to `pipe` whose reply `read_supervisors` takes."""
    pipe.hgetall(keys.supervisors())


def read_supervisors(value: object, now: int) -> Sequence[SupervisorView]:
    """Returns the supervisors of the last day, given the reply; what is no state is left out. `now`: server ms."""
    views = [_view(text, now) for text in cast(Mapping[bytes, bytes], value or {}).values()]
    return [view for view in views if view and view.age_ms < KEPT_S * 1000]


def _view(text: bytes, now: int) -> SupervisorView | None:
    try:
        fields = json.loads(text)
        at, clock_ms = int(fields.pop("at")), int(fields.pop("clock_ms"))
        known = {name: value for name, value in fields.items() if name in SupervisorState.__slots__}
        return SupervisorView(SupervisorState(**known), max(0, now - at), clock_ms)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _field(host: str, pid: int) -> str:
    return f"{host}:{pid}"
