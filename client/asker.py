"""Questions to the server that many calls share: one thread asks, and each call waits no longer than its timeout."""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, described
from millstream.client.channel.requests import NO_THREAD, client_closed

T = TypeVar("T")

REFRESH_WAIT_S = 0.25
"""Seconds that a call waits for a new answer if it has an older one. A healthy server answers within milliseconds."""

IDLE_S = 2.0
"""Seconds without a question after which the thread ends; the next question starts another."""


class Question(Generic[T]):
    """Question that waits for its answer. `before` is an older answer, if there is one."""

    def __init__(self, before: T | None) -> None:
        self.future: Future[T] = Future()
        self._before = before
        self._asked_at = time.monotonic()

    def wait_s(self, until: float | None) -> float | None:
        """Returns the seconds to wait for the answer from now. None means as long as the connection's own timeouts."""
        now = time.monotonic()
        limits = [] if until is None or until == math.inf else [until]
        limits += [] if self._before is None else [self._asked_at + REFRESH_WAIT_S]
        return max(0.0, min(limits) - now) if limits else None

    def wait(self, until: float | None) -> None:
        """Blocks until the answer is there, at most `wait_s(until)` seconds."""
        wait([self.future], self.wait_s(until))

    def answer(self) -> T:
        """Returns the answer, or the older one if the server cannot be reached or is slow.

        Raises the question's error, or BrokerUnavailable if there is neither a new nor an older answer.
        """
        if self.future.done():
            try:
                return self.future.result()
            except BrokerUnavailable as error:
                if self._before is None:
                    raise copy.copy(error) from None
            except MillstreamError as error:
                # A copy for each caller: a raised error keeps its caller's frames alive.
                raise copy.copy(error) from None
        if self._before is None:
            raise BrokerUnavailable("the server did not answer in time", hint="it is overloaded, frozen or cut off")
        return self._before


class Asker:
    """Asks questions on its own thread, one at a time; calls with equal questions share one. Thread-safe.

    The thread is a daemon, so a process can end while the server that it asks is frozen.
    """

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """Gives a forked child its own thread and lock."""
        # Reentrant: a signal handler may interrupt the thread that holds the lock, and make a call.
        self._lock = threading.RLock()
        self._under_way: dict[Hashable, Question[Any]] = {}
        self._new: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def close(self) -> None:
        """Refuses new questions. A question that is being asked goes on."""
        self._closed = True

    def ask(self, key: Hashable, action: Callable[[], T], before: T | None) -> Question[T]:
        """Returns, at once, the open question `key`, or a new one, which `action` answers in the thread."""
        with self._lock:
            question = self._under_way.get(key)
            if question is None:
                question = self._under_way[key] = Question(before)
                if error := self._start(lambda: self._answer(key, question, action)):
                    del self._under_way[key]
                    question.future.set_exception(error)
            return question

    def _start(self, task: Callable[[], None]) -> MillstreamError | None:
        """Gives `task` to the thread; returns an error if it cannot run. Called under the lock."""
        if self._closed:
            return client_closed()
        self._new.put(task)
        if self._thread is None:
            thread = threading.Thread(target=self._run, args=(self._new,), name="millstream-asker", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._new = queue.SimpleQueue()
                return BrokerUnavailable(f"the client cannot start a thread: {error}", hint=NO_THREAD)
            self._thread = thread
        return None

    def _run(self, tasks: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            try:
                tasks.get(timeout=IDLE_S)()
            except queue.Empty:
                with self._lock:
                    if tasks.empty():
                        self._thread = None
                        return

    def _answer(self, key: Hashable, question: Question[T], action: Callable[[], T]) -> None:
        error: MillstreamError | None = None
        try:
            answer = action()
        except MillstreamError as ours:
            error = ours.with_traceback(None)
        except Exception as other:  # noqa: BLE001 - all callers get it, and the thread answers the next question
            error = MillstreamError(f"the client cannot read the service: {described(other)}")
        with self._lock:
            self._under_way.pop(key, None)
        if error is None:
            question.future.set_result(answer)
        else:
            question.future.set_exception(error)
