"""Decides which models of a pool are in memory: pure, with the time and the free memory as arguments.

A model that is not resident is loaded if jobs wait for it, the one whose jobs may wait least first. If its memory is
not free, other models leave: those without jobs, then those whose jobs may wait longest. A model with jobs leaves only
for one whose jobs are about to be late and may wait less than its own. Every model stays for a minimum residence, so
that two models do not take turns at loading. Without jobs a model is loaded only into free memory. If the limit is
exceeded, as by a model that was loaded for the first time or by a cache that grew, one leaves at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from millstream.worker.scheduling.slack import NO_WORK_S

LEAST_RESIDENCE_S = 2.0
RESIDENCE_FACTOR = 5.0
"""By default a model stays for LEAST_RESIDENCE_S, at least for RESIDENCE_FACTOR times the time of its load and of the
load that would replace it. So at most about a sixth of the time goes into loads."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One model of a pool. `slack_s`: seconds that its jobs may still wait, its load included if it is not resident.

    `rank`: position in PRIORITIES of its most urgent job. `order`: its `priority`. `held`: bytes that it occupies while
    it is resident, `loading`: most bytes while it is loaded; both 0 before its first load. `load_s`: seconds of a load.
    `since`: monotonic seconds since which it is resident. `keep`: it never leaves. `blocked`: it must not be loaded
    now, because a load failed.
    """

    resident: bool
    slack_s: float = NO_WORK_S
    rank: int = 0
    order: float = 0.0
    held: int = 0
    loading: int = 0
    load_s: float = 0.0
    since: float = 0.0
    keep: bool = False
    blocked: bool = False

    @property
    def has_jobs(self) -> bool:
        return self.slack_s != NO_WORK_S

    @property
    def urgency(self) -> tuple[float, ...]:
        """Sorts models, the most urgent one first. Late ones are equal, but for their class and `priority`."""
        return (0, self.rank, self.order) if self.slack_s < 0 else (1, self.slack_s, self.order)


class Swap(NamedTuple):
    """The next change: models that leave, then the one that is loaded, by position; None to load none."""

    evict: Sequence[int]
    load: int | None


class Memory(NamedTuple):
    """Bytes that are free under the limit, below 0 if it is exceeded; None if there is no limit.

    `residence_s`: seconds that a model stays at least; None for the default.
    """

    free: int | None
    residence_s: float | None = None


def next_swap(models: Sequence[Standing], memory: Memory, now: float) -> Swap | None:
    """The next change at `now`, monotonic seconds; None if none is due."""
    if memory.free is not None and memory.free < 0 and (spared := _spared(models)) is not None:
        return Swap((spared,), None)
    waiting = [at for at, each in enumerate(models) if not (each.resident or each.blocked)]
    urgent = sorted((at for at in waiting if models[at].has_jobs or models[at].keep), key=lambda at: _key(models[at]))
    if urgent:
        # Only the most urgent one: another one might take the memory that it waits for.
        return _make_room(models, urgent[0], memory, now)
    idle = [at for at in waiting if _fits(models[at], memory.free)]
    return Swap((), min(idle, key=lambda at: models[at].order)) if idle else None


def _key(model: Standing) -> tuple[float, ...]:
    return (not model.keep, *model.urgency)


def _fits(model: Standing, free: int | None) -> bool:
    return free is None or free > model.loading


def _make_room(models: Sequence[Standing], place: int, memory: Memory, now: float) -> Swap | None:
    model, free = models[place], memory.free
    if free is None or _fits(model, free):
        return Swap((), place)
    leaving: list[int] = []
    for at in _by_slack(models):
        if _may_leave(models[at], model, memory, now):
            leaving.append(at)
            free += models[at].held
            if _fits(model, free):
                return Swap(leaving, place)
    alone = not any(each.resident for at, each in enumerate(models) if at not in leaving)
    # Alone it may try: memory that is not free then is that of the process itself, or of caches.
    return Swap(leaving, place) if alone else None


def _by_slack(models: Sequence[Standing]) -> list[int]:
    """Positions of the resident models, those that can be spared first."""
    resident = [at for at, each in enumerate(models) if each.resident]
    return sorted(resident, key=lambda at: (models[at].urgency, -models[at].since), reverse=True)


def _may_leave(model: Standing, candidate: Standing, memory: Memory, now: float) -> bool:
    if model.keep or now - model.since < _residence_s(model, candidate, memory):
        return False
    if candidate.keep or not model.has_jobs:
        return True
    is_pressed = candidate.slack_s <= candidate.load_s
    return is_pressed and candidate.urgency <= model.urgency


def _residence_s(model: Standing, candidate: Standing, memory: Memory) -> float:
    if memory.residence_s is not None:
        return memory.residence_s
    return max(LEAST_RESIDENCE_S, RESIDENCE_FACTOR * max(model.load_s, candidate.load_s))


def _spared(models: Sequence[Standing]) -> int | None:
    """The resident model that can be spared first; None if it is the only one, or all are kept."""
    resident = _by_slack(models)
    return next((at for at in resident if not models[at].keep), None) if len(resident) > 1 else None
