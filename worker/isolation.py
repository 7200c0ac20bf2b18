"""Keeps the worker's descriptors and signal handlers from a user's code and from the programs that it starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None


def isolate(*private: int) -> int:
    """Keeps standard input and the descriptors `private` from user code. Returns a new descriptor of the old stdin.

    Standard input becomes empty: a program that a handler starts would otherwise wait for ever if it reads the
    supervisor's pipe, to which nothing is written. Standard output goes to standard error: programs read the
    supervisor's standard output to see when workers are ready.
    """
    for each in private:
        os.set_inheritable(each, False)
    stdin_fd = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    if hasattr(sys.stdout, "reconfigure"):
        # A process that is killed does not flush its buffers.
        sys.stdout.reconfigure(line_buffering=True)
    return stdin_fd


class Takeover:
    """Lets `handler` handle signals until `end`, in this process alone.

    A forked process, such as one of multiprocessing, gets the old handlers back: it can be terminated, and its signals
    do not drain its parent.
    """

    def __init__(self, numbers: Iterable[int], handler: Handler) -> None:
        self.before: dict[int, Handler] = {number: signal.getsignal(number) for number in numbers}
        for number in self.before:
            signal.signal(number, handler)
        _open.add(self)

    def end(self) -> None:
        """Restores the old handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        _open.discard(self)


_open: set[Takeover] = set()


def _forked() -> None:
    for takeover in list(_open):
        takeover.end()


os.register_at_fork(after_in_child=_forked)
