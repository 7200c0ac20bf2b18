"""Thread: carries what all threads of a process submit to the server, in few script calls and in order.

Enqueueing is idempotent by job id, so it sends again through cut connections and restarts until the submission's time
is over.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from millstream.broker.admission import refusal
from millstream.broker.connection import Connection, is_transient, translated
from millstream.broker.errors import BrokerUnavailable, MillstreamError
from millstream.broker.registry import Registry
from millstream.broker.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, Admission, Streams
from millstream.client.baton import baton
from millstream.client.orders import AWAY_PAUSE_S, Cancellation, Submission, client_closed

LINGER_S = 0.002
"""While callers are being woken, the sender waits so long for what they send: a script call for each costs more."""

LINGER_FOR, LINGER_SHARE = 64, 3
"""It waits for so many orders at most, and for one in so many of the jobs under way: the others keep server and workers
busy meanwhile."""


class Sender(threading.Thread):
    """Takes submissions in order, those of one service together, and carries them to the server."""

    def __init__(
        self,
        connection: Connection,
        registry: Registry,
        client_id: str,
        forget: Callable[[str, Sequence[str]], None],
        awaited: Callable[[], int],
    ) -> None:
        super().__init__(name="millstream-sender", daemon=True)
        self._client_id = client_id
        self._forget = forget
        self._awaited = awaited
        self._connection = connection
        self._registry = registry
        self._ready: deque[Submission | Cancellation] = deque()
        self._later: list[tuple[float, int, Submission]] = []
        self._count = itertools.count()
        self._client = connection.own()
        self._services: dict[str, Streams] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waits = False
        self._closed = False

    def put(self, orders: Sequence[Submission | Cancellation]) -> None:
        """Raises BrokerUnavailable once closed."""
        with self._lock:
            if self._closed:
                raise client_closed()
            self._ready.extend(orders)
            if self._waits:
                self._changed.notify()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        while self._step():
            pass
        for order in self._ready:
            if isinstance(order, Cancellation):
                order.told(BrokerUnavailable("this client was closed", hint="its jobs go on"))

    def _step(self) -> bool:
        # A call of its own: what it held must not stay alive while the next step waits.
        batch = self._gather()
        if batch and isinstance(batch[0], Cancellation):
            self._cancel(cast(list[Cancellation], batch))
        elif batch:
            self._enqueue(cast(list[Submission], batch))
        return bool(batch)

    def _streams(self, service: str) -> Streams:
        if service not in self._services:
            self._services[service] = Streams(self._client, self._registry.keys(service))
        return self._services[service]

    def _enqueue(self, batch: Sequence[Submission]) -> None:
        try:
            with translated(self._connection.safe_url):
                admissions = self._streams(batch[0].service).enqueue([submission.group for submission in batch])
        except Exception as error:  # noqa: BLE001 - every caller hears of it; the sender serves the next
            self._failed(batch, error)
        else:
            for submission, admission in zip(batch, admissions, strict=True):
                if admission.refused:
                    self._refused(submission, admission)

    def _cancel(self, batch: Sequence[Cancellation]) -> None:
        job_ids = [job_id for each in batch for job_id in each.job_ids]
        unsent = self._withdraw(job_ids)
        try:
            with translated(self._connection.safe_url):
                found = self._streams(batch[0].service).cancel(job_ids, self._client_id)
        except Exception as error:  # noqa: BLE001 - every caller hears of it; the sender serves the next
            for cancellation in batch:
                cancellation.told(_ours(error, "cancel"))
            return
        outcomes = dict(zip(job_ids, found, strict=True))
        # What the server never had was waiting here.
        outcomes |= {job_id: "waiting" for job_id in unsent if outcomes[job_id] == "gone"}
        for cancellation in batch:
            cancellation.told([outcomes[job_id] for job_id in cancellation.job_ids])

    def _withdraw(self, job_ids: Sequence[str]) -> set[str]:
        """Do not send these jobs any more; those that were still to be sent, or to be sent again."""
        unwanted = set(job_ids)

        def wanted(order: Submission | Cancellation) -> bool:
            return isinstance(order, Cancellation) or unwanted.isdisjoint(order.job_ids)

        with self._lock:
            waiting = [*self._ready, *(submission for *_, submission in self._later)]
            self._ready = deque(filter(wanted, self._ready))
            self._later = [each for each in self._later if wanted(each[2])]
            heapq.heapify(self._later)
        return unwanted & {job_id for order in waiting if not wanted(order) for job_id in order.job_ids}

    def _gather(self) -> list[Submission | Cancellation]:
        """What is ready for one script call: submissions of one service, or cancellations; nothing when closed."""
        with self._lock:
            while not self._closed and not self._due():
                next_s = self._later[0][0] - time.monotonic() if self._later else None
                self._waits = True
                self._changed.wait(None if next_s is None else max(0.0, next_s))
                self._waits = False
            self._linger()
            if self._closed:
                return []
            first = self._ready.popleft()
            batch = [first]
            jobs, size = first.jobs, first.size
            while self._ready and _alike(after := self._ready[0], first):
                jobs, size = jobs + after.jobs, size + after.size
                if jobs > MAX_JOBS_PER_CALL or size > MAX_BYTES_PER_CALL:
                    break
                batch.append(after)
                self._ready.popleft()
            return batch

    def _linger(self) -> None:
        """More is on its way here, from callers that have their answers."""
        due = baton.due
        missing = min(LINGER_FOR, (due + self._awaited()) // LINGER_SHARE) - len(self._ready)
        if not due or missing <= 0:
            return
        self._lock.release()
        try:
            baton.after(missing, LINGER_S)
        finally:
            self._lock.acquire()

    def _due(self) -> bool:
        while self._later and self._later[0][0] <= time.monotonic():
            self._ready.append(heapq.heappop(self._later)[2])
        return bool(self._ready)

    def _refused(self, submission: Submission, admission: Admission) -> None:
        error = refusal(submission.service, admission)
        if error and error.retryable:
            self._again(submission, error, admission.retry_after)
        elif error:
            self._refuse(submission, error)

    def _failed(self, batch: Sequence[Submission], error: Exception) -> None:
        ours = _ours(error, "enqueue")
        pause = ours.retry_after or (AWAY_PAUSE_S if is_transient(error) else None)
        for submission in batch:
            self._again(submission, ours, pause)

    def _again(self, submission: Submission, error: MillstreamError, pause: float | None) -> None:
        """Send again after `pause` seconds, or tell the sink where there is no time or no hope."""
        at = time.monotonic() + (pause or 0.0)
        if pause is None or (submission.until is not None and at >= submission.until):
            self._refuse(submission, error)
            return
        with self._lock:
            heapq.heappush(self._later, (at, next(self._count), submission))

    def _refuse(self, submission: Submission, error: MillstreamError) -> None:
        self._forget(submission.service, submission.job_ids)
        submission.sink.refused(submission.job_ids, error)


def _alike(one: Submission | Cancellation, other: Submission | Cancellation) -> bool:
    return type(one) is type(other) and one.service == other.service


def _ours(error: Exception, doing: str) -> MillstreamError:
    if isinstance(error, MillstreamError):
        return error
    return BrokerUnavailable(f"{doing} failed: {type(error).__name__}: {error}")
