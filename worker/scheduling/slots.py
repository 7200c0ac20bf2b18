"""Slots of an engine whose rows run for many steps: which rows get them, and how many jobs the worker claims for them.

Rows wait in Redis until a slot is free for them, and a few more are prepared here. So priorities, deadlines and other
workers see what waits. A more urgent row needs no free slot: it displaces a less urgent one, see displacement.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.claims import ClaimBudget
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL
from millstream.worker.forward_cost import ForwardCost
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import BY_SHARE, SUSPECT, Rows, priority_of
from millstream.worker.scheduling.batcher import Budget, Pool

PREFETCH = 8
"""Slots. For this many slots one row is prepared in advance, and for fewer slots one, too."""

ANY_TOKENS = 10**9
"""Tokens. No limit for claims of jobs that displace others: the displaced rows make room."""

_ONE = Budget(1, ANY_TOKENS, packs=True)
_ALL = Budget(ANY_TOKENS, ANY_TOKENS, packs=True)

REALTIME = 0
"""Position of realtime rows in PRIORITIES."""


class Slots:
    """Slots of one engine, and the rows of `pool` that wait for them.

    `reserved` slots are for realtime rows only; at least one slot is for all.
    """

    def __init__(self, pool: Pool[Prepared], cost: ForwardCost, room: Budget) -> None:
        self._pool = pool
        self._cost = cost
        self._room = room
        self._count = room.rows
        self._running = [0] * len(PRIORITIES)
        self.reserved = 0

    def note_running(self, rows: Iterable[int]) -> None:
        """Notes the rows that run, by their positions in PRIORITIES."""
        self._running = [0] * len(PRIORITIES)
        for priority in rows:
            self._running[priority] += 1

    def note_room(self, room: Budget) -> None:
        """Notes what the engine can add to the rows that run."""
        self._room = room
        self._count = sum(self._running) + (room.rows if room.tokens > 0 else 0)

    @property
    def free(self) -> int:
        """Free slots, the reserved ones included."""
        return max(0, self._count - sum(self._running))

    @property
    def _shared(self) -> int:
        """Free slots that are not kept for realtime rows."""
        less_urgent = sum(self._running[REALTIME + 1 :])
        return max(0, min(self.free, max(1, self._count - self.reserved) - less_urgent))

    # -- rows that wait here -----------------------------------------------------------------------------------

    def take(self, *, suspects_only: bool) -> Rows:
        """Removes the rows from the pool that get free slots now, and returns them: by rank, the oldest first.

        If a row has a slot but too few tokens, no row that is equally or less urgent gets them: the rows that were
        displaced for it would take their tokens back.
        """
        rows: Rows = []
        refused = len(PRIORITIES)
        for rank in sorted(self._pool.ranks()):
            if suspects_only and rank != SUSPECT:
                break
            first = self._pool.oldest(rank, _ONE)[0]
            if priority_of(first) >= refused:
                continue
            batch = self._take_rank(rank)
            if not batch and self._free_for(rank):
                refused = priority_of(first)
            rows += batch
            if rank == SUSPECT and batch:
                # Suspects run beside no row that has no output yet.
                break
        return rows

    def _take_rank(self, rank: int) -> Rows:
        rows = self._free_for(rank)
        if not rows:
            return []
        forward = self._cost.one_forward()
        budget = replace(forward, rows=rows, tokens=min(forward.tokens, self._room.tokens), packs=True)
        batch = self._pool.oldest(rank, budget)
        # Only an engine without rows gets a row that exceeds its room: such a row would never have room.
        if sum(row.tokens for row in batch) > self._room.tokens and any(self._running):
            return []
        self._pool.remove(batch)
        for row in batch:
            self._running[priority_of(row)] += 1
        self._room = replace(
            self._room,
            rows=self._room.rows - len(batch),
            tokens=self._room.tokens - sum(row.tokens for row in batch),
        )
        return batch

    def _free_for(self, rank: int) -> int:
        first = self._pool.first(rank)
        return self.free if first and priority_of(first) == REALTIME else self._shared

    def claimants(self, *, suspects_only: bool) -> list[int]:
        """The waiting rows without a free slot, in order: for each the lowest position in PRIORITIES it may displace.

        A row displaces less urgent rows. A suspect may displace one of its own class, since other work waits until it
        has output. A row that spends its class's share displaces none.
        """
        free, shared = self.free, self._shared
        floors: list[int] = []
        for rank in sorted(self._pool.ranks()):
            if suspects_only and rank != SUSPECT:
                break
            for row in self._pool.oldest(rank, _ALL):
                priority = priority_of(row)
                fits = bool(floors or free < self._room.rows or row.tokens <= self._room.tokens)
                if fits and (free if priority == REALTIME else shared):
                    free -= 1
                    shared = max(0, min(free, shared - (priority != REALTIME)))
                else:
                    floors.append(len(PRIORITIES) if rank == BY_SHARE else priority + (rank != SUSPECT))
        return floors

    # -- claims ------------------------------------------------------------------------------------------------

    def room(
        self, held: int, empty_handed: bool, live_workers: int, max_attempts: int, last_job: tuple[int, int]
    ) -> ClaimBudget | None:
        """Budget of a claim now; None if there is a row for each free slot. The arguments are those of ClaimBudget.

        A worker leaves half of what it could take beyond its share to others: a text keeps its slot for long, so the
        first worker that claims should not take all of them.
        """
        free = self._shared - self._pool.count
        tokens = self._room.tokens - self._pool.tokens
        if free <= 0 or tokens <= 0:
            return None
        rows = free + max(1, self._count // PREFETCH)
        return ClaimBudget(
            jobs=min(MAX_JOBS_PER_CALL, rows),
            rows=rows,
            tokens=tokens,
            live_workers=live_workers,
            empty_handed=empty_handed,
            held=held,
            next_rows=(free + 1) // 2,
            max_attempts=max_attempts,
            job=last_job,
        )

    def urgent_room(self) -> ClaimBudget | None:
        """Budget of a claim of jobs that are more urgent than running ones, though no slot is free for all."""
        realtime, normal, _ = (self._pool.waiting(rank) for rank in range(len(PRIORITIES)))
        _, running_normal, running_batch = self._running
        rows, streams = self._shared + running_batch - realtime - normal, 2
        if rows <= 0:
            rows, streams = self.free + running_normal + running_batch - realtime, 1
        if rows <= 0:
            return None
        return ClaimBudget(min(MAX_JOBS_PER_CALL, rows), rows, ANY_TOKENS, streams=streams, returned=streams)

    def suspect_room(self, stream: int, live_workers: int, held: int) -> ClaimBudget | None:
        """Budget of a claim of suspects of `stream`, 1 to 3, that run before the waiting rows.

        None if a waiting row is more urgent, or if only more urgent rows have slots.
        """
        rows = self.free + sum(self._running[stream - 1 :])
        if not rows or any(self._pool.waiting(rank) for rank in (BY_SHARE, *range(stream - 1))):
            return None
        return ClaimBudget(
            jobs=min(MAX_JOBS_PER_CALL, rows),
            rows=rows,
            tokens=ANY_TOKENS,
            live_workers=live_workers,
            empty_handed=True,
            held=held,
            next_rows=rows,
        )

    def least_share(self) -> int:
        """Rows that a class saves before some of its rows run early: a row needs one slot."""
        return 1
