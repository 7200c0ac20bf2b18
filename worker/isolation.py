"""Keeps what is the worker's own from a user's code and the programs that it starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None


def isolate(*private: int) -> int:
    """Keep standard input and the descriptors `private` from user code; the new descriptor of what was standard input.

    Standard input becomes empty: a program that a handler starts, and that reads it, would wait for ever for a pipe on
    which nothing is ever written. Standard output goes to standard error: that of a supervisor says when workers are
    ready, and programs read it.
    """
    for each in private:
        os.set_inheritable(each, False)
    stdin_fd = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    if hasattr(sys.stdout, "reconfigure"):
        # A process that is killed writes no buffer.
        sys.stdout.reconfigure(line_buffering=True)
    return stdin_fd


class Takeover:
    """Signals that `handler` handles until `end`, in this process alone.

    A process that is forked from it, as multiprocessing does, handles them as before: it can be terminated, and its
    signals are not its parent's.
    """

    def __init__(self, numbers: Iterable[int], handler: Handler) -> None:
        self.before: dict[int, Handler] = {number: signal.getsignal(number) for number in numbers}
        for number in self.before:
            signal.signal(number, handler)
        _open.add(self)

    def end(self) -> None:
        """Put back what was before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        _open.discard(self)


_open: set[Takeover] = set()


def _forked() -> None:
    for takeover in list(_open):
        takeover.end()


os.register_at_fork(after_in_child=_forked)
