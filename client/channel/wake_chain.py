"""Wake chain: threads that wait for answers are woken one after another.

Only one thread of a process runs Python at a time. If a hundred are woken at once, they only queue for the interpreter,
and each asks for it again every few ms. So each thread wakes the next one when it runs: passing the baton (G. R.
Andrews, "A method for solving synchronization problems", 1989).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable

SLOW_S = 0.0004
"""Mean seconds from the wake-up of a thread until it runs, above which the chain is too slow.

If the other threads only make calls, the mean is 0.15 ms. If they compute between calls, it is up to 5 ms
(sys.getswitchinterval) for each thread, and a thread that is not woken yet does not even queue for the interpreter.
"""

ALL_AT_ONCE_S = 1.0
"""Seconds for which all threads are woken at once after the chain was too slow, as without a chain."""

_WEIGHT = 0.01
"""Weight of one wake-up in the moving mean."""

_LONGEST_S = 0.005
"""Seconds that one wake-up counts at most: a short stall of the machine must not decide."""

_CREDIT_S = 0.0005
"""Seconds below zero from which the mean starts, also after ALL_AT_ONCE_S: threads that were woken at once still queue
for the interpreter when the chain starts again, and its first wake-ups are slow."""


class WakeChain:
    """Chain of the waiters of one process. Each waiter is a lock on which its thread sleeps. Thread-safe."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may interrupt the thread that holds the lock, and make a call.
        self._lock = threading.RLock()
        self._due: deque[threading.Lock] = deque()
        self._waking: threading.Lock | None = None
        self._woken_at = self._all_at_once_until = 0.0
        self._mean_s = -_CREDIT_S

    def after_fork(self) -> None:
        """Empties the chain in a forked child, with a new lock: another thread of the parent may have held the old one.

        No other thread exists in the child.
        """
        self._lock = threading.RLock()
        self._due.clear()
        self._waking = None

    @property
    def due(self) -> int:
        """Number of threads that have their answer and do not run yet."""
        return len(self._due) + (self._waking is not None)

    def wake(self, waiters: Iterable[threading.Lock]) -> None:
        """Wakes these, in order, after the waiters that are in the chain. Each must call `leave` when it runs."""
        with self._lock:
            self._due.extend(waiters)
            if self._waking is None:
                self._wake_next()

    def leave(self, waiter: threading.Lock) -> None:
        """Removes `waiter`, whose thread runs again, whether it was woken or not. Wakes the next one."""
        with self._lock:
            if waiter is self._waking:
                self._note_run(time.monotonic())
                self._wake_next()
            elif waiter in self._due:
                # Its wait timed out first. The thread that is being woken may be slow, or lost to an interrupt.
                self._due.remove(waiter)
                self._wake_next()

    def wait_for(self, threads: int, timeout: float) -> None:
        """Sleeps until `threads` of the threads in the chain run, or all of them; at most `timeout` seconds."""
        turn = threading.Lock()
        turn.acquire()
        with self._lock:
            if self._waking is None:
                return
            # A place in the chain: the thread before it wakes it.
            self._due.insert(threads - 1, turn)
        turn.acquire(timeout=timeout)
        with self._lock:
            if turn is self._waking:
                self._wake_next()
            elif turn in self._due:
                self._due.remove(turn)

    def _note_run(self, now: float) -> None:
        """Adds to the mean the time that the last woken thread took until it runs, at `now`."""
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
