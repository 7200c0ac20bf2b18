"""Keeps suspects apart in a process with several lanes: while one is in a stage, no other lane is in any.

The process cannot know which of its threads made it die, so all jobs in a stage are charged. A suspect, which was
charged before, therefore has its next stages without other lanes. So no lane's jobs can be buried for the fault of
another lane's job, if max_attempts is above 1.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Stage = Callable[[bool], AbstractContextManager[None]]
"""Wraps a stage of one lane; the argument says whether a suspect takes part."""


class StageGate:
    """The lanes' threads that are in a stage; thread-safe. Lanes are named by their services."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: Counter[str] = Counter()
        self._alone: str | None = None
        self._alone_threads = 0

    @contextmanager
    def stage(self, lane: str, alone: bool) -> Iterator[None]:
        """Wraps a stage of `lane`; waits before it while another lane has the process for itself.

        If `alone`, no stage of other lanes begins, and this one begins when theirs have ended.
        """
        self._enter(lane, alone)
        try:
            yield
        finally:
            self._leave(lane, alone)

    def _enter(self, lane: str, alone: bool) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, lane))
            self._threads[lane] += 1
            if alone:
                self._alone = lane
                self._alone_threads += 1
                self._changed.wait_for(lambda: self._threads.total() == self._threads[lane])

    def _leave(self, lane: str, alone: bool) -> None:
        with self._changed:
            self._threads[lane] -= 1
            if alone:
                self._alone_threads -= 1
                if not self._alone_threads:
                    self._alone = None
            self._changed.notify_all()
