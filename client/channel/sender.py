"""Sender thread: sends the requests of all threads of a process to the server, in order and in few script calls.

Enqueueing is idempotent by job id, so the thread sends again after cut connections and restarts until the deadline of
the submission.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.contract.operations import STREAMING_OPS
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import CancelOutcome
from millstream.broker.queue.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, Streams
from millstream.broker.queue.submission import Submission
from millstream.broker.queue.submitter import Submitter
from millstream.broker.transport.connection import Connection, translated
from millstream.client.channel.requests import Cancellation, client_closed
from millstream.client.channel.wake_chain import wake_chain

log = logging.getLogger(__name__)

LINGER_S = 0.002
"""Seconds that the sender waits at most for the next requests of callers that are being woken.

A script call for each of their requests would cost more than the wait.
"""

LINGER_FOR, LINGER_SHARE = 64, 3
"""Requests to wait for: at most LINGER_FOR, and at most 1/LINGER_SHARE of the jobs in flight. The other jobs keep the
server and the workers busy during the wait."""

TEXTS_S, LOOK_S = 0.01, 0.0005
"""Seconds that the sender waits at most for more texts to generate, and from one look to the next.

It waits only if several have come, as from tasks of one event loop, and until no more come. A worker computes prompts
that it gets together in one forward, so that those that come later need not wait for the first ones.
"""


class Sender(threading.Thread):
    """Thread that sends requests in order; adjacent submissions of one service share a script call.

    `awaited` returns the number of jobs whose answers have not been read.
    """

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
        self._client = connection.own()
        self._services: dict[str, Streams] = {}
        self._submitter = Submitter(self._streams, connection.safe_url, self._refuse)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waits = False
        self._closed = False
        self._cancelling = 0

    def put(self, requests: Sequence[Submission | Cancellation]) -> None:
        """Appends requests to the queue of the thread. Raises BrokerUnavailable if the sender is closed."""
        with self._lock:
            if self._closed:
                raise client_closed()
            self._ready.extend(requests)
            if requests and isinstance(requests[0], Cancellation):
                self._cancelling += 1
            if self._waits:
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread."""
        with self._lock:
            self._closed = True
            self._changed.notify()

    def flush(self, timeout: float) -> None:
        """Waits until every cancellation has been sent to the server, for at most `timeout` seconds."""
        with self._lock:
            self._changed.wait_for(lambda: not self._cancelling or self._closed, timeout)

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Returns why a job waits to be sent again; None if it does not wait."""
        return self._submitter.refusal_of(job_id)

    def run(self) -> None:
        while not self._closed:
            try:
                self._step()
            except Exception:
                # The thread must go on: it serves all calls of the process.
                log.exception("sending failed; the sender continues")
        self._submitter.close(client_closed)
        for request in self._ready:
            if isinstance(request, Cancellation):
                _report(request, BrokerUnavailable("this client was closed", hint="its jobs still run"))
            else:
                self._refuse(request, client_closed())

    def _step(self) -> None:
        # A function of its own: its local variables must not stay alive while the next step waits.
        self._submitter.retry()
        batch = self._gather(self._submitter.next_at)
        if batch and isinstance(batch[0], Cancellation):
            self._cancel(cast(list[Cancellation], batch))
        elif batch:
            self._submitter.submit(cast(list[Submission], batch))

    def _streams(self, service: str) -> Streams:
        if service not in self._services:
            self._services[service] = Streams(self._client, self._registry.keys(service))
        return self._services[service]

    def _cancel(self, batch: Sequence[Cancellation]) -> None:
        job_ids = [job_id for each in batch for job_id in each.job_ids]
        # The submissions of these jobs were handled before. Jobs that the server does not have wait to be sent again.
        unsent = self._submitter.withdraw(job_ids)
        try:
            with translated(self._connection.safe_url):
                call = batch[0].call
                found = self._streams(batch[0].service).cancel(job_ids, "" if call else self._client_id, call)
        except Exception as error:  # noqa: BLE001 - every caller gets it, and the sender serves the next request
            for cancellation in batch:
                _report(cancellation, _as_own_error(error))
        else:
            outcomes = dict(zip(job_ids, found, strict=True))
            outcomes |= {job_id: "waiting" for job_id in unsent if outcomes[job_id] == "gone"}
            for cancellation in batch:
                _report(cancellation, [outcomes[job_id] for job_id in cancellation.job_ids])
        with self._lock:
            self._cancelling -= len(batch)
            self._changed.notify_all()

    def _gather(self, next_at: float | None) -> list[Submission | Cancellation]:
        """Waits for requests and returns those for one script call: submissions of one service, or cancellations.

        Returns an empty list at `next_at`, monotonic seconds, or if the sender is closed.
        """
        with self._lock:
            while not self._closed and not self._ready:
                wait_s = None if next_at is None else next_at - time.monotonic()
                if wait_s is not None and wait_s <= 0:
                    return []
                self._waits = True
                self._changed.wait(wait_s)
                self._waits = False
            if not self._closed:
                self._linger()
                self._wait_for_texts()
            if self._closed:
                return []
            first = self._ready.popleft()
            batch = [first]
            if not self._ready:
                return batch
            jobs, size = first.jobs, first.size
            while self._ready and _share_a_call(after := self._ready[0], first):
                jobs, size = jobs + after.jobs, size + after.size
                if jobs > MAX_JOBS_PER_CALL or size > MAX_BYTES_PER_CALL:
                    break
                batch.append(after)
                self._ready.popleft()
            return batch

    def _linger(self) -> None:
        """Waits briefly for callers that have just got their answers: they are likely to send their next requests."""
        due = wake_chain.due
        missing = min(LINGER_FOR, (due + self._awaited()) // LINGER_SHARE) - len(self._ready)
        if not due or missing <= 0:
            return
        self._lock.release()
        try:
            wake_chain.wait_for(missing, LINGER_S)
        finally:
            self._lock.acquire()

    def _wait_for_texts(self) -> None:
        seen, until = 1, time.monotonic() + TEXTS_S
        while len(self._ready) > seen and _is_text(self._ready[0]) and not self._closed and time.monotonic() < until:
            seen = len(self._ready)
            self._changed.wait(LOOK_S)

    def _refuse(self, submission: Submission, error: MillstreamError) -> None:
        self._forget(submission.service, submission.job_ids)
        try:
            submission.sink.refused(submission.job_ids, error)
        except Exception:
            # One caller's error must not end the thread, which serves all others.
            log.exception("a refusal could not be handed to its caller")


def _report(cancellation: Cancellation, outcomes: Sequence[CancelOutcome] | MillstreamError) -> None:
    try:
        cancellation.report(outcomes)
    except Exception:
        log.exception("the outcome of a cancellation could not be handed to its caller")


def _is_text(request: Submission | Cancellation) -> bool:
    """Returns whether a request is a call that generates text."""
    return isinstance(request, Submission) and request.group.drafts[0].op in STREAMING_OPS


def _share_a_call(one: Submission | Cancellation, other: Submission | Cancellation) -> bool:
    """Returns whether both can be sent in one script call."""
    if isinstance(one, Cancellation) and isinstance(other, Cancellation) and one.call != other.call:
        return False
    return type(one) is type(other) and one.service == other.service


def _as_own_error(error: Exception) -> MillstreamError:
    if isinstance(error, MillstreamError):
        return error
    return BrokerUnavailable(f"the cancellation failed: {type(error).__name__}: {error}")
