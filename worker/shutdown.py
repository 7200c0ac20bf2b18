"""How a worker process ends: by draining, by a signal, or because one of its threads failed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)


class ThreadFailed(Exception):
    """A thread met an error it does not know. What the process holds is given back by its supervisor."""


class Ended(BaseException):
    """A signal ends this process at once. Raised in the main thread: no fault of the code that it interrupts."""


class Shutdown:
    """Shared by the threads of one process; thread-safe. Not for signal handlers: see Relay."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._failure = ""

    @property
    def draining(self) -> bool:
        return self.stopped.is_set()

    def drain(self) -> None:
        self.stopped.set()

    def pause(self, seconds: float) -> None:
        """Sleep, but not past the begin of draining."""
        self.stopped.wait(seconds)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around a thread's whole work: an unknown error ends the process instead of leaving it half alive."""
        try:
            yield
        except BaseException as error:
            # Not Exception: what a library's Rust code panics with is none.
            self._failure = f"{threading.current_thread().name} failed: {type(error).__name__}: {error}"
            log.debug("thread failed", exc_info=True)
            self.stopped.set()

    def check(self) -> None:
        """Raises ThreadFailed if a guarded thread failed."""
        if self._failure:
            raise ThreadFailed(self._failure)


class Relay:
    """Calls `act` in a thread of its own after each `ring`, which is safe in a signal handler.

    A handler runs in the middle of whatever its thread was doing: a lock that it takes may be one that this thread
    holds, and that would never be released.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._thread = threading.Thread(target=self._pass_on, name="signals", daemon=True)
        self._thread.start()

    def ring(self, *_: object) -> None:
        # Full: it is read soon, and one ring is as good as many.
        with suppress(BlockingIOError):
            os.write(self._writing, b"!")

    def close(self) -> None:
        """End its thread. No handler may ring any more."""
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    def _pass_on(self) -> None:
        while os.read(self._reading, 4096):
            self._act()
