"""Ends a worker process: by draining, by a signal, or because one of its threads failed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)


class ThreadFailed(Exception):
    """A thread failed with an unknown error. The supervisor gives the jobs of the process back."""


class Ended(BaseException):
    """A signal ends this process at once. Raised in the main thread; the code that it interrupts is not at fault."""


class Shutdown:
    """State of a process's end, shared by its threads; thread-safe. Signal handlers must use a Relay.

    A lane of a pool has one of its own, `of` that of its process: it may end while the process goes on.
    """

    def __init__(self, of: Shutdown | None = None) -> None:
        self.stopped = threading.Event()
        self._failure = ""
        self._process = of
        self._lanes: list[Shutdown] = []
        if of:
            of._lanes.append(self)
            if of.draining:
                self.stopped.set()

    @property
    def draining(self) -> bool:
        return self.stopped.is_set()

    @property
    def evicting(self) -> bool:
        """Whether only this lane ends, because its model leaves the memory of its pool."""
        return self.draining and self._process is not None and not self._process.draining

    def drain(self) -> None:
        self.stopped.set()
        for lane in list(self._lanes):
            lane.stopped.set()

    def forget(self, lane: Shutdown) -> None:
        """Forgets a lane that has ended."""
        self._lanes.remove(lane)

    def pause(self, seconds: float) -> None:
        """Sleeps for `seconds`; returns at once when draining begins."""
        self.stopped.wait(seconds)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Wraps a thread's whole work: an unknown error drains the process, which cannot work without that thread."""
        try:
            yield
        except BaseException as error:
            # BaseException, since a panic in a library's Rust code is no Exception.
            self._failure = f"{threading.current_thread().name} failed: {type(error).__name__}: {error}"
            log.debug("thread failed", exc_info=True)
            self.stopped.set()
            if self._process:
                self._process.fail(self._failure)

    def fail(self, reason: str) -> None:
        """Drains the process because a thread of one of its lanes failed."""
        self._failure = self._failure or reason
        self.drain()

    def check(self) -> None:
        """Raises ThreadFailed if a guarded thread failed."""
        if self._failure:
            raise ThreadFailed(self._failure)


class Relay:
    """Calls `act` in a thread of its own after each `ring`. `ring` is safe in a signal handler.

    A signal handler interrupts its thread at any point. If it took a lock that the thread holds, both would wait for
    ever.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._thread = threading.Thread(target=self._pass_on, name="signals", daemon=True)
        self._thread.start()

    def ring(self, *_: object) -> None:
        # If the pipe is full, a call of `act` is due anyway.
        with suppress(BlockingIOError):
            os.write(self._writing, b"!")

    def close(self) -> None:
        """Ends the thread. No handler may call `ring` afterwards."""
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    def _pass_on(self) -> None:
        while os.read(self._reading, 4096):
            self._act()
