"""Threads that wait for answers, woken one after another.

One thread of a process runs Python at a time. A hundred woken at once, a thundering herd, only queue for the
interpreter, and each asks for it anew every few ms. So each thread wakes the next one once it runs: passing the baton
(G. R. Andrews, "A method for solving synchronization problems", 1989).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable

SLOW_S = 0.0004
"""A woken thread runs after 0.15 ms in the mean where the others only call. Where they compute between calls it takes
longer, up to 5 ms for each (sys.getswitchinterval), and whoever is not woken yet does not even stand in the queue."""

ALL_AT_ONCE_S = 1.0
"""Then so long all are woken at once, as they would be without us."""

_WEIGHT = 0.01
_LONGEST_S = 0.005
"""A hiccup of the machine is no sign of anything."""
_CREDIT_S = 0.0005
"""After a crowd: it still stands in the queue when threads are woken one by one again."""


class WakeChain:
    """Waiters of one process, each a lock that its thread sleeps on; thread-safe."""

    def __init__(self) -> None:
        # Of the kind that its holder may take again: a signal's handler may come in between, and call.
        self._lock = threading.RLock()
        self._due: deque[threading.Lock] = deque()
        self._waking: threading.Lock | None = None
        self._woken_at = self._all_at_once_until = 0.0
        self._mean_s = -_CREDIT_S

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the lock in its parent, and nobody else lives here."""
        self._lock = threading.RLock()
        self._due.clear()
        self._waking = None

    @property
    def due(self) -> int:
        """Threads that have their answer and do not run yet."""
        return len(self._due) + (self._waking is not None)

    def wake(self, waiters: Iterable[threading.Lock]) -> None:
        """Wake these, in order, after those that are due already. each must then call `leave`."""
        with self._lock:
            self._due.extend(waiters)
            if self._waking is None:
                self._wake_next()

    def leave(self, waiter: threading.Lock) -> None:
        """`waiter` sleeps no more, woken or not, and nobody will wake it from now on: the next one's turn."""
        with self._lock:
            if waiter is self._waking:
                self._note_run(time.monotonic())
                self._wake_next()
            elif waiter in self._due:
                # It ran out of patience first: the one before it may be slow, or lost in an interrupt.
                self._due.remove(waiter)
                self._wake_next()

    def wait_for(self, threads: int, timeout: float) -> None:
        """Sleep until so many of those that are due run, or all of them; for `timeout` seconds at most."""
        turn = threading.Lock()
        turn.acquire()
        with self._lock:
            if self._waking is None:
                return
            # In the row with them: whoever is woken before it wakes it.
            self._due.insert(threads - 1, turn)
        turn.acquire(timeout=timeout)
        with self._lock:
            if turn is self._waking:
                self._wake_next()
            elif turn in self._due:
                self._due.remove(turn)

    def _note_run(self, now: float) -> None:
        """The thread that was woken last runs `now`."""
        took = min(now - self._woken_at, _LONGEST_S)
        self._mean_s += _WEIGHT * (took - self._mean_s)
        if self._mean_s > SLOW_S:
            self._mean_s, self._all_at_once_until = -_CREDIT_S, now + ALL_AT_ONCE_S

    def _wake_next(self) -> None:
        self._waking, self._woken_at = None, time.monotonic()
        if self._woken_at < self._all_at_once_until:
            while self._due:
                self._due.popleft().release()
        elif self._due:
            self._waking = self._due.popleft()
            self._waking.release()


wake_chain = WakeChain()

os.register_at_fork(after_in_child=wake_chain.after_fork)
