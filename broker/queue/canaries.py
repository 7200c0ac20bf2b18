"""Canaries on the server: read with their route, driven by the one supervisor that holds their lease."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import redis

from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue import scripts
from millstream.broker.queue.canary_sample import Sample
from millstream.broker.queue.canary_state import CanaryState
from millstream.broker.queue.metrics import Metrics
from millstream.broker.transport.cluster import owner

LEASE_MS = 5_000
"""Milliseconds for which a driver holds a canary after its last look. Another supervisor takes over then."""


class Turn(NamedTuple):
    """One look of a driver at `now`, server ms. `state` is None if another supervisor drives or the canary is gone."""

    now: int
    state: CanaryState | None
    text: bytes


@dataclass(frozen=True, slots=True)
class CanaryView:
    """A canary as it is seen. `driver` is the supervisor that drives it, "" if none does. `now` is in server ms."""

    state: CanaryState
    driver: str
    now: int


class Canaries:
    """The canaries of routes, for one driver. Raises redis errors from each call."""

    def __init__(self, client: redis.Redis, driver: str) -> None:
        self._client = client
        self._driver = driver

    def look(self, keys: ServiceKeys, run: str) -> Turn:
        """Takes or renews the lease of the canary `run`, if no other supervisor holds it."""
        return self._call(keys, run, b"", "")

    def decide(self, keys: ServiceKeys, turn: Turn, state: CanaryState) -> bool:
        """Writes the state that follows from `turn`. Returns False if somebody else was faster."""
        return self._call(keys, state.run, turn.text, state.to_json()).state is not None

    def _call(self, keys: ServiceKeys, run: str, text: bytes, state: str) -> Turn:
        args: list[scripts.Argument] = [run, self._driver, LEASE_MS, text, state]
        holds, now, found = scripts.run(self._client, "canary", [keys.canary()], args)
        return Turn(now, _decode(found) if holds else None, found)


def read_canary(client: redis.Redis, keys: ServiceKeys, route: RouteSpec) -> CanaryView | None:
    """Returns the canary of the route; None if none was started since its weights were changed, or it is lost."""
    if not route.canary_run:
        return None
    found = client.hmget(keys.canary(), "run", "driver", "until", "state")
    run, driver, until, text = cast(Sequence[bytes | None], found)
    state = _decode(text)
    if state is None or run != route.canary_run.encode():
        return None
    seconds, micros = owner(client, keys.canary()).time()
    now = int(seconds) * 1000 + int(micros) // 1000
    is_driven = until is not None and now < int(until)
    return CanaryView(state, (driver or b"").decode() if is_driven else "", now)


def _decode(text: bytes | None) -> CanaryState | None:
    """Returns the state in a record, None if there is none or a newer version wrote it."""
    try:
        return CanaryState.from_json(text) if text else None
    except Malformed:
        return None


def read_samples(metrics: Metrics, route: RouteSpec, to: str, weights: Mapping[str, float]) -> tuple[Sample, Sample]:
    """Returns the totals of version `to`, and of the others that have a weight. Raises BrokerUnavailable."""
    others = [version for version, weight in weights.items() if weight > 0 and version != to]
    new, *rest = metrics.services([route.services[version] for version in (to, *others)])
    return Sample.of([new]), Sample.of(rest)
