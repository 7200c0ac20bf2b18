"""Questions to the server that many calls share: one thread asks, and no call waits longer than it wants to."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Hashable

# Named in full: `concurrent.futures` imports it at its first use, and no call may import a module.
from concurrent.futures import Future, wait
from concurrent.futures.thread import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from millstream.broker.errors import BrokerUnavailable, MillstreamError
from millstream.client.orders import NO_THREAD, client_closed

T = TypeVar("T")

PATIENCE_S = 0.25
"""Seconds a call waits for a newer answer if it has an older one. A healthy server answers within milliseconds."""


class Question(Generic[T]):
    """One question under way. `before` is an older answer, if there is one."""

    def __init__(self, future: Future[T], before: T | None) -> None:
        self.future = future
        self._before = before
        self._asked_at = time.monotonic()

    def wait_s(self, until: float | None) -> float | None:
        """Seconds to wait for the answer from now; None for as long as the server's own time-outs last."""
        now = time.monotonic()
        limits = [] if until is None or until == math.inf else [until]
        limits += [] if self._before is None else [self._asked_at + PATIENCE_S]
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
    """Asks questions on a thread of its own, one at a time; the same question is under way once. Thread-safe."""

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: a thread and a lock of its own."""
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, Question[Any]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="millstream-asker")
        self._closed = False

    def close(self) -> None:
        """Ask nothing any more; a question under way goes on."""
        self._closed = True
        self._thread.shutdown(wait=False)

    def ask(self, key: Hashable, action: Callable[[], T], before: T | None) -> Question[T]:
        """The question `key` that is under way, or a new one that `action` answers. Returns at once."""
        with self._lock:
            question = self._under_way.get(key)
            if question is None:
                question = Question(self._submit(key, action), before)
                if not question.future.done():
                    self._under_way[key] = question
            return question

    def _submit(self, key: Hashable, action: Callable[[], T]) -> Future[T]:
        def answered() -> T:
            try:
                return action()
            finally:
                with self._lock:
                    self._under_way.pop(key, None)

        try:
            return self._thread.submit(answered)
        except RuntimeError as error:
            # It is closed; or the system has no thread left, or the interpreter is ending.
            failed: Future[T] = Future()
            no_thread = BrokerUnavailable(f"the client cannot start a thread: {error}", hint=NO_THREAD)
            failed.set_exception(client_closed() if self._closed else no_thread)
            return failed
