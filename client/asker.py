"""Questions to the server that many calls share: one thread asks, and no call waits longer than it wants to."""

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
"""Seconds a call waits for a newer answer if it has an older one. A healthy server answers within milliseconds."""

IDLE_S = 2.0
"""Seconds without a question after which the thread that asks ends; the next question starts another."""


class Question(Generic[T]):
    """One question under way. `before` is an older answer, if there is one."""

    def __init__(self, before: T | None) -> None:
        self.future: Future[T] = Future()
        self._before = before
        self._asked_at = time.monotonic()

    def wait_s(self, until: float | None) -> float | None:
        """Seconds to wait for the answer from now; None for as long as the server's own time-outs last."""
        now = time.monotonic()
        limits = [] if until is None or until == math.inf else [until]
        limits += [] if self._before is None else [self._asked_at + REFRESH_WAIT_S]
        return max(0.0, min(limits) - now) if limits else None

    def wait(self, until: float | None) -> None:
        """Block for `wait_s`, or until the answer is there."""
        wait([self.future], self.wait_s(until))

    def answer(self) -> T:
        """The answer, or the older one if the server is away or slow.

        Raises the question's error; BrokerUnavailable if there is no answer at all.
        """
        if self.future.done():
            try:
                return self.future.result()
            except BrokerUnavailable as error:
                if self._before is None:
                    raise copy.copy(error) from None
            except MillstreamError as error:
                # One of its own for each caller: a raised error keeps its caller's frames alive.
                raise copy.copy(error) from None
        if self._before is None:
            raise BrokerUnavailable("the server did not answer in time", hint="it is overloaded, frozen or cut off")
        return self._before


class Asker:
    """Asks questions on a thread of its own, one at a time; the same question is under way once. Thread-safe.

    The thread is a daemon: a process ends though the server it asks is frozen.
    """

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: a thread and a lock of its own."""
        # Of the kind that its holder may take again: a signal's handler may come in between, and call.
        self._lock = threading.RLock()
        self._under_way: dict[Hashable, Question[Any]] = {}
        self._new: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def close(self) -> None:
        """Ask nothing any more; a question under way goes on."""
        self._closed = True

    def ask(self, key: Hashable, action: Callable[[], T], before: T | None) -> Question[T]:
        """The question `key` that is under way, or a new one that `action` answers. Returns at once."""
        with self._lock:
            question = self._under_way.get(key)
            if question is None:
                question = self._under_way[key] = Question(before)
                if error := self._start(lambda: self._answer(key, question, action)):
                    del self._under_way[key]
                    question.future.set_exception(error)
            return question

    def _start(self, task: Callable[[], None]) -> MillstreamError | None:
        """Have `task` run by the thread, under the lock; why it cannot be."""
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
        except Exception as other:  # noqa: BLE001 - all that wait hear of it; the thread serves the next
            error = MillstreamError(f"the client cannot read the service: {described(other)}")
        with self._lock:
            self._under_way.pop(key, None)
        if error is None:
            question.future.set_result(answer)
        else:
            question.future.set_exception(error)
