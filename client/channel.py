"""One process's traffic with one server: a sender thread for all calls, a reader thread for each service.

The sender coalesces what many threads submit into few script calls. Enqueueing is idempotent by job id, so it sends
again through cut connections and restarts until the submission's time is over; readers read again likewise.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from millstream.broker.admission import refusal
from millstream.broker.connection import Connection, is_transient, translated
from millstream.broker.errors import BrokerUnavailable, DeadlineExceeded, MillstreamError
from millstream.broker.registry import Registry
from millstream.broker.replies import Replies
from millstream.broker.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, Admission, CancelOutcome, Group, Streams
from millstream.client.baton import baton

log = logging.getLogger(__name__)

READ_S = 2.0
SWEEP_S = 10.0
_AWAY_PAUSE_S = 0.1

LINGER_S = 0.002
"""While callers are being woken, the sender waits so long for what they send: a script call for each costs more."""

LINGER_FOR, LINGER_SHARE = 64, 3
"""It waits for so many orders at most, and for one in so many of the jobs under way: the others keep server and workers
busy meanwhile."""


class Sink(Protocol):
    """Who waits for jobs. Called from the channel's threads: must be quick and raise nothing."""

    def answered(self, job_id: str, reply: bytes) -> None: ...

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None: ...


class Submission(NamedTuple):
    """Jobs to be accepted together. Refusals are waited out until `until` (monotonic seconds; None: for ever)."""

    service: str
    group: Group
    sink: Sink
    until: float | None

    @property
    def job_ids(self) -> list[str]:
        return [draft.id for draft in self.group.drafts]

    @property
    def jobs(self) -> int:
        return len(self.group.drafts)

    @property
    def size(self) -> int:
        """Bytes of the bodies."""
        return sum([len(draft.body) for draft in self.group.drafts])


@dataclass(frozen=True, slots=True, eq=False)
class Cancellation:
    """Jobs nobody wants any more. `told` gets one outcome a job, or the error that kept us from asking."""

    service: str
    job_ids: Sequence[str]
    told: Callable[[Sequence[CancelOutcome] | MillstreamError], None]

    @property
    def jobs(self) -> int:
        return len(self.job_ids)

    @property
    def size(self) -> int:
        return 0


class Channel:
    """Shared by all clients of a process that talk to one server; thread-safe. Threads start with the first call."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._closed = False
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: an identity, locks and threads of its own; its parent's calls are not its calls."""
        self.client_id = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._readers: dict[str, _Reader] = {}
        self._sender: _Sender | None = None

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Send these, answers and refusals to their sinks. Returns at once. Raises BrokerUnavailable once closed."""
        for submission in submissions:
            reader = self._readers.get(submission.service) or self._reader(submission.service)
            reader.expect(submission)
        (self._sender or self._sending()).put(submissions)

    def cancel(self, cancellation: Cancellation) -> None:
        """Stop jobs; in order with what was submitted before, so that none slips in behind. Returns at once."""
        self.forget(cancellation.service, cancellation.job_ids)
        (self._sender or self._sending()).put([cancellation])

    def forget(self, service: str, job_ids: Sequence[str]) -> None:
        """Nobody waits for these jobs any more; late answers are dropped."""
        if reader := self._readers.get(service):
            reader.forget(job_ids)

    @property
    def stray_replies(self) -> int:
        """Replies so far that nobody waited for."""
        with self._lock:
            return sum(reader.strays for reader in self._readers.values())

    def close(self) -> None:
        """End the threads; jobs under way go on without anybody waiting."""
        with self._lock:
            self._closed = True
            if self._sender:
                self._sender.close()
            readers = list(self._readers.values())
        for reader in readers:
            reader.close()
        self._connection.close()

    def _awaited(self) -> int:
        """Jobs whose answers have not been read."""
        return sum([reader.awaited for reader in list(self._readers.values())])

    def _sending(self) -> _Sender:
        with self._lock:
            self._check_open()
            if self._sender is None:
                self._sender = _Sender(self._connection, self._registry, self.client_id, self.forget, self._awaited)
                self._sender.start()
            return self._sender

    def _reader(self, service: str) -> _Reader:
        with self._lock:
            self._check_open()
            reader = self._readers.get(service)
            if reader is None:
                client = self._connection.blocking(READ_S)
                replies = Replies(client, self._registry.keys(service), self.client_id)
                reader = self._readers[service] = _Reader(service, replies)
                reader.start()
            return reader

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()


def _closed() -> BrokerUnavailable:
    return BrokerUnavailable("this client is closed", hint="make a new one")


class _Sender(threading.Thread):
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
                raise _closed()
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
        pause = ours.retry_after or (_AWAY_PAUSE_S if is_transient(error) else None)
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


_NOBODY: tuple[Sink | None, float | None] = (None, None)


class _Reader(threading.Thread):
    """Reads one service's replies while anybody waits for one; sleeps otherwise."""

    def __init__(self, service: str, replies: Replies) -> None:
        super().__init__(name=f"millstream-reader-{service}", daemon=True)
        self.strays = 0
        self._replies = replies
        self._waiting: dict[str, tuple[Sink, float | None]] = {}
        self._swept_at = time.monotonic()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False

    @property
    def awaited(self) -> int:
        """Jobs whose answers have not been read."""
        return len(self._waiting)

    def expect(self, submission: Submission) -> None:
        """Raises BrokerUnavailable once closed."""
        with self._lock:
            if self._closed:
                raise _closed()
            asleep = not self._waiting
            for draft in submission.group.drafts:
                self._waiting[draft.id] = (submission.sink, draft.deadline)
            if asleep:
                self._changed.notify()

    def forget(self, job_ids: Sequence[str]) -> None:
        with self._lock:
            for job_id in job_ids:
                self._waiting.pop(job_id, None)

    def close(self) -> None:
        """Nobody reads any more: who waits is told."""
        with self._lock:
            self._closed = True
            self._changed.notify()
            waiting, self._waiting = self._waiting, {}
        closed = BrokerUnavailable("this client was closed", hint="the job goes on without anybody waiting")
        for job_id, (sink, _) in waiting.items():
            sink.refused([job_id], closed)

    def run(self) -> None:
        while self._wanted():
            self._step()

    def _step(self) -> None:
        # A call of its own: what it held must not stay alive while nobody waits.
        try:
            answers = self._replies.read(READ_S)
        except Exception as error:  # noqa: BLE001 - whatever happened, callers wait for what comes next
            self._away(error)
            return
        with self._lock:
            sinks = [self._waiting.pop(job_id, _NOBODY)[0] for job_id, _ in answers]
        for sink, (job_id, reply) in zip(sinks, answers, strict=True):
            if sink:
                sink.answered(job_id, reply)
            else:
                self.strays += 1
        self._sweep()

    def _wanted(self) -> bool:
        with self._lock:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return not self._closed

    def _sweep(self) -> None:
        """End calls that their callers dropped, and that nobody answered in time."""
        now = time.monotonic()
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        with self._lock:
            over = [job for job, (_, end) in self._waiting.items() if end is not None and now > end + SWEEP_S]
            sinks = [self._waiting.pop(job_id)[0] for job_id in over]
        for job_id, sink in zip(over, sinks, strict=True):
            sink.refused([job_id], DeadlineExceeded("no answer in time"))

    def _away(self, error: Exception) -> None:
        # A closed socket ends a read in many ways.
        if not self._closed and not is_transient(error):
            log.error("reading replies failed, trying again: %s", error)
        with self._lock:
            self._changed.wait_for(lambda: self._closed, _AWAY_PAUSE_S)
