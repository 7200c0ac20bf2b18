"""Shadows: copies of calls that another version runs at priority batch, to compare its answers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    Cancelled,
    MillstreamError,
    QueueFull,
    ServicePaused,
    described,
)
from millstream.broker.contract.job import Json
from millstream.client.call_options import CallOptions
from millstream.client.handle import Handle
from millstream.client.result import Embeddings
from millstream.client.shadow_agreement import agreement
from millstream.client.shadow_counts import ShadowCounts
from millstream.client.transfer import Transfer
from millstream.client.version_choice import Chosen

log = logging.getLogger(__name__)

MOST = 8
"""Shadows of one process that wait or run at the same time. Further ones are dropped."""

TIMEOUT_S = 60.0
"""Seconds for which the answer of a shadow is waited for."""

EVERY_S = 1.0
"""Seconds between two additions of counts to the metrics. The thread ends after as long without a shadow."""


class ShadowCall(NamedTuple):
    """A call, and the version that is to run it, too, when it is answered. `send` sends the copy."""

    chosen: Chosen
    inputs: Sequence[Json]
    opts: CallOptions
    answered: Transfer
    send: Callable[[ShadowCall], Handle]


class _Running(NamedTuple):
    call: ShadowCall
    handle: Handle
    sent_at: float


class Shadows:
    """Shadows of one client. A shadow is sent when its call has been answered, by a thread of its own.

    So a call never waits for its shadow: not to be sent, not for room in the queue, not for its answer.
    """

    def __init__(self, counts: ShadowCounts) -> None:
        self._counts = counts
        self.after_fork()

    def after_fork(self) -> None:
        """Gives a forked child its own thread. Shadows belong to the parent."""
        self._counts.after_fork()
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[ShadowCall | None] = queue.SimpleQueue()
        self._open = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def follow(self, call: ShadowCall) -> None:
        """Sends a copy when the call has been answered by the version that it was sent to."""
        transfer, version, is_taken = call.answered, call.answered.version, False

        def end_if_over() -> None:
            nonlocal is_taken
            if transfer.rows.missing <= 0 and not is_taken:
                is_taken = True
                if transfer.version == version and transfer.rows.failure is None:
                    self._take(call)

        transfer.listeners.append(end_if_over)

    def _take(self, call: ShadowCall) -> None:
        """Queues a shadow for the thread, which it starts. Drops it if MOST are open. Waits for nothing."""
        with self._lock:
            if self._closed:
                return
            if self._open < MOST and self._start():
                self._open += 1
                self._news.put(call)
                return
        self._counts.end(call.chosen.spec.name, "dropped")

    def _start(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="millstream-shadows", daemon=True)
            # If no thread can be started, the next call tries again.
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
        return self._thread is not None

    def close(self) -> None:
        """Sends no more, and adds what was counted."""
        with self._lock:
            self._closed = True
        self._news.put(None)
        self._counts.flush()

    def _run(self) -> None:
        running: list[_Running] = []
        flush_at = time.monotonic() + EVERY_S
        while True:
            call, is_idle = self._next()
            if call is not None:
                running += self._begin(call)
            running = [each for each in running if not self._end_if_over(each)]
            if time.monotonic() >= flush_at:
                self._counts.flush()
                flush_at = time.monotonic() + EVERY_S
            if self._is_done(is_idle):
                break
        for each in running:
            each.handle.cancel_soon()
            self._counts.end(each.call.chosen.spec.name, "dropped")
        self._counts.flush()

    def _next(self) -> tuple[ShadowCall | None, bool]:
        """Returns the next shadow to send, if there is one, and whether nothing happened for EVERY_S."""
        try:
            return self._news.get(timeout=EVERY_S), False
        except queue.Empty:
            return None, True

    def _is_done(self, is_idle: bool) -> bool:
        """Returns whether the thread ends: the client is closed, or no shadow is open. Another may be started later."""
        with self._lock:
            if self._closed or (is_idle and not self._open):
                self._thread = None
                return True
            return False

    def _begin(self, call: ShadowCall) -> list[_Running]:
        try:
            sent_at = time.monotonic()
            handle = call.send(call)
            handle.listen(lambda: self._news.put(None))
            return [_Running(call, handle, sent_at)]
        except Exception as error:  # noqa: BLE001 - whatever a shadow does, the thread goes on with the others
            self._fail(call, error)
            return []

    def _end_if_over(self, running: _Running) -> bool:
        """Compares a shadow that is over with its call. Returns whether it is."""
        try:
            if not running.handle.done():
                return False
            ms = (time.monotonic() - running.sent_at) * 1000
            self._compare(running.call, running.handle.result(0), ms)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(running.call, error)
            return True
        with self._lock:
            self._open -= 1
        return True

    def _compare(self, call: ShadowCall, found: Embeddings | list[Json], ms: float) -> None:
        answer = call.answered.rows.value((call.answered.ended - call.answered.began) * 1000)
        spec = call.chosen.spec
        self._counts.compare(spec.name, agreement(spec.model.operation.results, answer, found), ms)

    def _fail(self, call: ShadowCall, error: Exception) -> None:
        """Counts a shadow that failed, or was dropped: the queue refused it, the server is away, the client closed."""
        is_dropped = isinstance(error, QueueFull | ServicePaused | BrokerUnavailable | Cancelled)
        self._counts.end(call.chosen.spec.name, "dropped" if is_dropped else "failed")
        if not isinstance(error, MillstreamError):
            log.warning("a shadow of service %s cannot be compared: %s", call.chosen.spec.name, described(error))
        with self._lock:
            self._open -= 1
