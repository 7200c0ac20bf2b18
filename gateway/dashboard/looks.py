"""Looks at the server every two seconds, in a thread of its own, for all pages and for the charts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.queue.examination import Examination
from millstream.broker.queue.views import ServiceView
from millstream.gateway.dashboard.history import History, Sample

log = logging.getLogger(__name__)

SERIES = ("waiting", "in_flight")
"""Names of the figures of a sample, in the order of the charts."""

EVERY_S = 2.0
"""Seconds between two looks."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look, at `at`, seconds since 1970. `found` is None if it failed, and then `error` says why."""

    at: float
    found: Examination | None
    error: str = ""


class Looks(Protocol):
    """Source of looks. `last` is quick; `again` looks now and may take as long as the server's answer."""

    history: History

    def last(self) -> Look: ...

    def again(self) -> Look: ...


class Watcher(threading.Thread):
    """Takes looks until `end`. A failed look is shown to the users, and the next one may succeed."""

    def __init__(self, examine: Callable[[], Examination], every_s: float = EVERY_S) -> None:
        super().__init__(name="looks", daemon=True)
        self.history = History()
        self._examine = examine
        self._every_s = every_s
        self._ended = threading.Event()
        self._taking = threading.Lock()
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
            look = self._look()
            if look.found:
                self.history.add(look.at, ((view.name, sample(view)) for view in look.found.views))
            self._last = look
        return look

    def _look(self) -> Look:
        try:
            return Look(time.time(), self._examine())
        except MillstreamError as error:
            return Look(time.time(), None, str(error))
        except Exception as error:
            # The next look may succeed: a thread that ended would show old figures for ever.
            log.exception("looking at the server failed")
            return Look(time.time(), None, f"internal error: {type(error).__name__}: {error}")


def sample(view: ServiceView) -> Sample:
    """Returns the figures of a service for the charts."""
    return {"waiting": view.depth, "in_flight": view.in_flight}
