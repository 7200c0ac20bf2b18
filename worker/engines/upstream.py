"""The engine of models that a server of its own runs: its rows are HTTP requests in flight.

Requests begin when the shared limit of the server allows it. A row whose request was refused, broke off or never
reached the server is displaced: it waits again with the other rows, no attempt is charged, and it goes on behind its
text so far. While no server is there, one row at most waits here, so the worker claims no more jobs; a small request,
not a job, finds out when the server is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from millstream.broker.contract.errors import (
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
)
from millstream.broker.contract.generation import LENGTH
from millstream.broker.contract.job import Json
from millstream.broker.contract.partial import Record
from millstream.broker.contract.slots import Demand
from millstream.worker.engines.base import Step
from millstream.worker.engines.upstream_http import Began, Chunk, Ended, Endpoint, Failed, Http, News
from millstream.worker.engines.upstream_limit import LimitKeeper, OwnSlots, Shares
from millstream.worker.engines.upstream_rows import Item
from millstream.worker.engines.upstream_text import Event, Route, Text
from millstream.worker.engines.upstream_wire import Call, Exchange, Fault, Kind, Server, broken
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import Outcome, Rows
from millstream.worker.scheduling.batcher import Budget, Row
from millstream.worker.scheduling.upstream_limit import Backoff, Delays

log = logging.getLogger(__name__)

STEP_S = 0.05
"""Seconds that a step waits for news at most."""

TRIES = 3
"""Requests for a row that the server fails before the row does."""

STRIKES = 5
"""Requests for a row in a row that break off without new output before the row fails. Requests that never reached the
server do not count."""

REFUSED_S, LONGEST_REFUSED_S = 0.05, 10.0
"""Seconds between two requests to a server that refuses all of them: at first, and at most."""

LONGEST_RETRY_S = 60.0
"""Seconds for which a server's Retry-After is obeyed at most."""

PROBE_S, LONGEST_PROBE_S = 0.1, 5.0
"""Seconds between two looks whether a server is back: at first, and at most."""

QUEUE_PART = 8
"""A server's queue is too long if it has more than one request, and more than the limit divided by this. Servers queue
each request for a moment."""

KEY_LOG_S = 60.0
"""Seconds between two log lines that say that the key is refused."""

MOST_REQUESTS = 4_096
"""Requests in flight of one worker that its progress page has room for."""


class Requests(Protocol):
    """Makes requests of rows. One request has at most `rows` rows."""

    rows: int

    def group(self, rows: Rows) -> Sequence[Exchange]:
        """Returns the requests that answer `rows`."""
        ...


class Generating:
    """A request for the text of one row."""

    def __init__(self, row: Row[Prepared], route: Route) -> None:
        self.rows: Rows = [row]
        self.text = cast(Text, row.payload.features)
        self._route = route

    def call(self, server: Server) -> Call:
        self.text.start(may_continue=self._route.may_continue(self.text.prompt, server))
        return self._route.call(self.text, server)

    def add(self, value: Chunk) -> Record | None:
        """Adds an event. Raises Fault."""
        event: Event = self._route.read(self.text, value.value)
        return self.text.add(event)

    def finish(self, answer: Json) -> Sequence[Outcome]:
        if not self.text.finish:
            raise broken("its answer ended without a finish reason")
        if self.text.has_diverged:
            log.warning("a text that began again on the server differs from the text shown before")
        if self.text.usage:
            self.rows[0].payload.tokens = max(1, self.text.usage.prompt)
        return [cast(Json, self.text.result().json())]


class Upstream:
    """Rows whose requests are in flight to `endpoint`, or wait here for a slot of the server.

    `waiting` counts the rows that wait for the engine.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        requests: Requests,
        server: Server,
        shares: Shares | None = None,
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        self._endpoint = endpoint
        self._requests = requests
        self._server = server
        self._waiting = waiting
        self._news = threading.Event()
        self._http = Http(endpoint, self._news.set)
        self._limit = LimitKeeper(shares or OwnSlots(), self._demand, self._news.set)
        self._ready: list[Exchange] = []
        self._flying: dict[int, Exchange] = {}
        self._dropped: dict[int, set[int]] = {}
        self._number = 0
        self._delays = Delays()
        self._refused = Backoff(REFUSED_S, LONGEST_REFUSED_S)
        self._probes = Backoff(PROBE_S, LONGEST_PROBE_S)
        self._refused_report = -1
        self._away = ""
        self._away_since = 0.0
        self._probing = False
        self._probed: list[str] = []
        self._key_logged_at = -KEY_LOG_S
        self._limit.start()

    # -- what the runner asks ----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._flying or self._ready)

    @property
    def away(self) -> str:
        """Reason why no request reaches the server; "" if requests do, or none was sent since."""
        return self._away

    def wake(self) -> None:
        """Ends the wait of a step, since rows can be admitted."""
        self._news.set()

    def room(self) -> Budget | None:
        """Rows of the requests that may begin now. An engine without rows has room for one: see the module."""
        rows = max(0, self._free() - len(self._ready)) * self._requests.rows
        return Budget(rows if rows or self.busy else 1, 10**9, packs=True)

    def admit(self, rows: Rows) -> None:
        self._ready += self._requests.group(rows)

    def abort(self, rows: Rows) -> None:
        dropped = set(map(id, rows))
        for each in self._ready:
            each.rows = _without(each.rows, dropped)
        self._ready = [each for each in self._ready if each.rows]
        for number, each in list(self._flying.items()):
            if not _without(each.rows, dropped | self._dropped.get(number, set())):
                self._dropped.pop(number, None)
                self._http.cancel(number)
                del self._flying[number]
            else:
                self._dropped.setdefault(number, set()).update(dropped)

    def conclude(self, rows: Rows, reason: str) -> Sequence[Outcome]:
        self.abort(rows)
        return [_concluded(row.payload.features, reason) for row in rows]

    def close(self) -> None:
        """Ends all requests."""
        self._limit.stop()
        self._http.close()
        self._limit.join(2.0)

    # -- slots -------------------------------------------------------------------------------------------------

    def _free(self) -> int:
        """Requests that may begin now."""
        if self._away or time.monotonic() < self._refused.until or self._refused_report == self._limit.reports:
            return 0
        return min(self._limit.slots, MOST_REQUESTS) - len(self._flying)

    def _demand(self) -> Demand:
        """For the keeper's thread. A worker that uses all of its slots could use as many more."""
        running = len(self._flying)
        if self._away:
            return Demand(running, 0)
        waiting = len(self._ready) + -(-self._waiting() // self._requests.rows)
        if running and running >= self._limit.slots:
            waiting = max(waiting, running)
        return Demand(running, waiting)

    def _begin(self) -> None:
        """Sends requests while slots are free, the most urgent rows first."""
        if not self._ready or self._free() <= 0:
            return
        self._ready.sort(key=lambda each: min(row.urgency for row in each.rows))
        while self._ready and self._free() > 0:
            each = self._ready.pop(0)
            self._number += 1
            self._flying[self._number] = each
            self._limit.note_begun()
            self._http.start(self._number, each.call(self._server))
        if self._flying and len(self._flying) >= self._limit.slots:
            self._limit.report_if_idle()

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self) -> Step:
        outcome = _Results()
        self._end_full(outcome)
        self._begin()
        if not outcome.rows:
            self._news.wait(STEP_S)
        self._news.clear()
        self._note_probe()
        for number, news in self._http.take():
            if each := self._flying.get(number):
                self._apply(number, each, news, outcome)
        if self._away or self._free() <= 0:
            # They would only wait here: with the others, more urgent rows come first.
            self._displace_ready(outcome)
        self._begin()
        return outcome.step()

    def _displace_ready(self, outcome: _Results) -> None:
        """Displaces rows whose requests cannot begin now; one stays if the engine has no other."""
        keep = 0 if self._flying else 1
        for each in self._ready[keep:]:
            outcome.displaced += each.rows
        del self._ready[keep:]

    def _end_full(self, outcome: _Results) -> None:
        """Ends texts that broke off after their last token."""
        for each in list(self._ready):
            if isinstance(each, Generating) and each.text.is_full:
                self._ready.remove(each)
                outcome.end(each.rows, [cast(Json, each.text.result(LENGTH).json())])

    def _apply(self, number: int, each: Exchange, news: News, outcome: _Results) -> None:
        try:
            match news:
                case Began(seconds):
                    self._note_began(seconds)
                case Chunk():
                    outcome.tokens += 1
                    if isinstance(each, Generating) and (record := each.add(news)):
                        outcome.records.append((each.rows[0], record))
                case Ended(value):
                    outcomes = each.finish(value)
                    dropped = self._leave(number)
                    for row, result in zip(each.rows, outcomes, strict=True):
                        if id(row) not in dropped:
                            outcome.end([row], [result])
                case Failed(fault, began):
                    each.rows = _without(each.rows, self._leave(number))
                    self._fail(each, fault, began, outcome)
        except Fault as fault:
            self._http.cancel(number)
            each.rows = _without(each.rows, self._leave(number))
            self._fail(each, fault, time.monotonic(), outcome)

    def _leave(self, number: int) -> set[int]:
        """Removes a request that has ended. Returns the ids of its rows that were aborted meanwhile."""
        del self._flying[number]
        return self._dropped.pop(number, set())

    def _note_began(self, seconds: float) -> None:
        self._refused.succeed()
        self._probes.succeed()
        waiting, self._http.queued = self._http.queued, 0
        is_slow = self._delays.observe(seconds, time.monotonic())
        if is_slow or waiting > max(1, self._limit.requests // QUEUE_PART):
            self._limit.note_queue()

    # -- faults ------------------------------------------------------------------------------------------------

    def _fail(self, each: Exchange, fault: Fault, began: float, outcome: _Results) -> None:
        match fault.kind:
            case Kind.REFUSED:
                self._note_refused(fault, began)
                outcome.displaced += each.rows
            case Kind.AWAY:
                self._note_away(fault.message)
                outcome.displaced += each.rows
            case Kind.KEY:
                self._log_key(fault)
                error = ModelFailed(f"the server refuses the key of this worker: {fault.message}", hint="see its log")
                outcome.end(each.rows, [error] * len(each.rows))
            case Kind.INVALID | Kind.FAILED:
                self._fail_rows(each, fault, outcome)
            case Kind.BROKEN:
                self._note_away(fault.message)
                self._strike(each, fault, outcome)

    def _fail_rows(self, each: Exchange, fault: Fault, outcome: _Results) -> None:
        """Ends the row at fault. The rows of a larger request are sent in halves until it is known which it is."""
        if len(each.rows) > 1:
            outcome.displaced += _parted(each.rows)
            return
        item = cast("Text | Item", each.rows[0].payload.features)
        item.tries += 1
        if fault.too_long and isinstance(item, Text) and item.shown:
            # The prompt was accepted before: with its text it fills the model's context.
            outcome.end(each.rows, [cast(Json, item.result(LENGTH).json())])
        elif fault.kind is Kind.INVALID:
            kind = InputTooLong if fault.too_long else InvalidRequest
            outcome.end(each.rows, [kind(f"the server refuses the request: {fault.message}")])
        elif item.tries >= TRIES:
            outcome.end(each.rows, [ModelFailed(f"the server failed {TRIES} times: {fault.message}")])
        else:
            self._refused.fail(time.monotonic(), min(LONGEST_RETRY_S, fault.retry_s))
            outcome.displaced += each.rows

    def _strike(self, each: Exchange, fault: Fault, outcome: _Results) -> None:
        """Ends a row whose requests broke off too often. Rows of a larger request are displaced, in halves."""
        if len(each.rows) > 1:
            outcome.displaced += _parted(each.rows)
            return
        item = cast("Text | Item", each.rows[0].payload.features)
        item.strikes += 1
        if item.strikes >= STRIKES:
            error = f"the server's answer broke off {STRIKES} times without new output: {fault.message}"
            outcome.end(each.rows, [ModelFailed(error)])
        else:
            outcome.displaced += each.rows

    def _note_refused(self, fault: Fault, began: float) -> None:
        self._limit.note_refused(began, fault.retry_s)
        # No request before the limit is known that follows from this.
        self._refused_report = self._limit.reports
        if not self._flying:
            self._refused.fail(time.monotonic(), min(LONGEST_RETRY_S, fault.retry_s))

    def _log_key(self, fault: Fault) -> None:
        if time.monotonic() - self._key_logged_at >= KEY_LOG_S:
            self._key_logged_at = time.monotonic()
            log.error(
                "%s refuses the key of this worker (%s): jobs fail until api_key_file or api_key_env in this host's "
                "config.yaml names the right one",
                self._endpoint.url,
                fault.message,
            )

    # -- a server that is away ---------------------------------------------------------------------------------

    def _note_away(self, reason: str) -> None:
        """Sends no more requests until a probe finds the server. The first probe follows at once."""
        if not self._away:
            self._away, self._away_since = reason, time.monotonic()
            log.info("%s: %s; looking whether it is there", self._endpoint.url, reason)
            self._probe()

    def _probe(self) -> None:
        self._probing = True
        self._http.probe(self._probed.append)

    def _note_probe(self) -> None:
        now = time.monotonic()
        if self._probed:
            (reason,) = self._probed
            self._probed.clear()
            self._probing = False
            if reason:
                if self._probes.fail(now) <= PROBE_S:
                    log.warning("%s is away, claiming goes on when it is back: %s", self._endpoint.url, reason)
                self._away = reason
            else:
                log.info("%s is there again after %.1f s", self._endpoint.url, now - self._away_since)
                self._away = ""
                # A server that is there and breaks off all answers gets fewer and fewer requests.
                self._refused.fail(now)
        elif self._away and not self._probing and now >= self._probes.until:
            self._probe()


class _Results:
    """Results of one step as they come."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.outcomes: list[Outcome] = []
        self.records: list[tuple[Row[Prepared], Record]] = []
        self.displaced: Rows = []
        self.tokens = 0

    def end(self, rows: Rows, outcomes: Sequence[Outcome]) -> None:
        self.rows += rows
        self.outcomes += outcomes

    def step(self) -> Step:
        # A row that failed or was displaced may have made records in the same step: they were shown before that.
        tokens = self.tokens or sum(row.payload.tokens for row in self.rows)
        return Step(self.rows, self.outcomes, self.records, ran=len(self.rows), tokens=tokens, displaced=self.displaced)


def _without(rows: Rows, dropped: set[int]) -> Rows:
    return [row for row in rows if id(row) not in dropped]


def _parted(rows: Rows) -> Rows:
    """Returns the rows of a request that failed, to be sent again in two requests."""
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        token = object()
        for row in part:
            cast(Item, row.payload.features).part = token
    return rows


def _concluded(features: object, reason: str) -> Outcome:
    if not isinstance(features, Text):
        error: MillstreamError = DeadlineExceeded("not answered by its server in time", phase="inference")
        return error
    return cast(Json, features.result(reason).json())
