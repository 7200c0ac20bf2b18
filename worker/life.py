"""How a worker process ends: by draining, or because one of its threads failed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class ThreadFailed(Exception):
    """A thread met an error it does not know. What the process holds is given back by its supervisor."""


class Life:
    """Shared by the threads of one process; thread-safe, and safe in a signal handler."""

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
        """Raises ThreadFailed where a guarded thread failed."""
        if self._failure:
            raise ThreadFailed(self._failure)
