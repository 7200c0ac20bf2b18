"""Stages of a job's run: when its worker claimed it, prepared it, ran it and settled it. Pure."""

from __future__ import annotations

from typing import NamedTuple, cast

_MOST_MS = 2**53
_MOST_NAME = 128
"""Most characters of a worker's name that are read."""


class Stages(NamedTuple):
    """The run that answered a job. Times are ms of the server's clock, as the worker estimates it; 0 if not reached.

    `attempts`: earlier runs that did not finish, 0.5 for each host lost meanwhile. `batch`: rows that were in the model
    when the job began, its own included. `enqueued` is the time in its entry. `prepared`, `started` and `ended` are the
    ends of the tokenizer's work, of the wait for the model, and of its last forward.
    """

    worker: str
    attempts: float = 0.0
    batch: int = 0
    enqueued: int = 0
    claimed: int = 0
    prepared: int = 0
    started: int = 0
    ended: int = 0
    settled: int = 0


def read_stages(value: object) -> Stages | None:
    """Returns the stages in a reply's head; None if there are none, or if they are malformed: an answer needs none."""
    if not isinstance(value, list) or len(value) != len(Stages._fields):
        return None
    worker, attempts, *numbers = value
    if not isinstance(worker, str) or len(worker) > _MOST_NAME or not isinstance(attempts, int | float):
        return None
    if not (0 <= attempts <= _MOST_MS and all(type(each) is int and 0 <= each <= _MOST_MS for each in numbers)):
        return None
    return Stages(worker, float(attempts), *cast(list[int], numbers))
