"""Threads that wait for answers, woken one after another.

One thread of a process runs Python at a time. A hundred woken at once, a thundering herd, only queue for the
interpreter, and each asks for it anew every few ms. So each thread wakes the next one once it runs: passing the baton
(G. R. Andrews, "A method for solving synchronization problems", 1989).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable


class Baton:
    """Waiters of one process, each a lock that its thread sleeps on; thread-safe."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Also in a forked child: another thread may have held the lock in its parent."""
        self._lock = threading.Lock()
        self._due: deque[threading.Lock] = deque()
        self._waking: threading.Lock | None = None

    @property
    def busy(self) -> bool:
        """Whether threads that have their answer are still asleep."""
        return bool(self._due)

    def wake(self, waiters: Iterable[threading.Lock]) -> None:
        """Wake these, in order, after those that are due already. Each must say when it `left`."""
        with self._lock:
            self._due.extend(waiters)
            if self._waking is None:
                self._wake_next()

    def left(self, waiter: threading.Lock) -> None:
        """`waiter` sleeps no more, woken or not, and nobody will wake it from now on: the next one's turn."""
        with self._lock:
            if waiter is self._waking:
                self._wake_next()
            elif waiter in self._due:
                # It ran out of patience first: the one before it may be slow, or lost in an interrupt.
                self._due.remove(waiter)
                self._wake_next()

    def _wake_next(self) -> None:
        self._waking = self._due.popleft() if self._due else None
        if self._waking:
            self._waking.release()


baton = Baton()

os.register_at_fork(after_in_child=baton.begin)
