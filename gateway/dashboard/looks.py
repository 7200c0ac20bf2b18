"""Looks at the server every two seconds, in a thread of its own, for all pages and for the charts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.queue import pace as paces
from millstream.broker.queue.examination import Examination, examine
from millstream.broker.queue.metrics import Metrics, ServiceMetrics
from millstream.broker.transport.connection import Connection
from millstream.gateway.dashboard.history import History
from millstream.gateway.dashboard.traffic import Traffic, measure_traffic, sample

log = logging.getLogger(__name__)

EVERY_S = 2.0
"""Seconds between two looks."""


@dataclass(frozen=True, slots=True)
class Sight:
    """All that one look reads: the examination, and the totals of its services by name."""

    found: Examination
    totals: Mapping[str, ServiceMetrics]


@dataclass(frozen=True, slots=True)
class Look:
    """One look, at `at`, seconds since 1970. `found` is None if it failed, and then `error` says why.

    `traffic` has rates and latencies of each service.
    """

    at: float
    found: Examination | None
    error: str = ""
    traffic: Mapping[str, Traffic] = field(default_factory=dict)


class Looks(Protocol):
    """Source of looks. `last` is quick; `again` looks now and may take as long as the server's answer."""

    history: History

    def last(self) -> Look: ...

    def again(self) -> Look: ...


def see(connection: Connection, prefix: str) -> Sight:
    """Reads what one look needs. Raises BrokerUnavailable."""
    found = examine(connection, prefix)
    names = [view.name for view in found.views]
    return Sight(found, {each.service: each for each in Metrics(connection, prefix).services(names)})


class Watcher(threading.Thread):
    """Takes looks until `end`. A failed look is shown to the users, and the next one may succeed."""

    def __init__(
        self, see: Callable[[], Sight], every_s: float = EVERY_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(name="looks", daemon=True)
        self.history = History()
        self._see = see
        self._every_s = every_s
        self._now = now
        self._ended = threading.Event()
        self._taking = threading.Lock()
        self._paces = paces.Paces()
        self._last: Look | None = None

    def run(self) -> None:
        while not self._ended.is_set():
            self.again()
            self._ended.wait(self._every_s)

    def end(self) -> None:
        """Ends the thread, without waiting for a look that is under way."""
        self._ended.set()

    def last(self) -> Look:
        return self._last or self.again()

    def again(self) -> Look:
        with self._taking:
            self._last = look = self._look()
        return look

    def _look(self) -> Look:
        try:
            return self._measure(self._see())
        except MillstreamError as error:
            self._paces.forget()
            return Look(time.time(), None, str(error))
        except Exception as error:
            # The next look may succeed: a thread that ended would show old figures for ever.
            log.exception("looking at the server failed")
            self._paces.forget()
            return Look(time.time(), None, f"internal error: {type(error).__name__}: {error}")

    def _measure(self, sight: Sight) -> Look:
        at, views = time.time(), sight.found.views
        totals = [sight.totals[view.name] for view in views]
        found = self._paces.add(paces.Look(self._now(), views, totals))
        pairs = zip(views, totals, strict=True)
        traffic = {view.name: measure_traffic(view, total, found.get(view.name)) for view, total in pairs}
        self.history.add(at, ((view.name, sample(view, traffic[view.name])) for view in views))
        return Look(at, sight.found, traffic=traffic)
