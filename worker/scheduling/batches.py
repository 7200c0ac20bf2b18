"""How many jobs a worker claims whose engine runs a batch a step: enough to choose from, and about a second of work."""

from __future__ import annotations

from millstream.broker.queue.claims import ClaimBudget
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL
from millstream.worker.forward_cost import ForwardCost
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import BY_SHARE
from millstream.worker.scheduling.batcher import Pool
from millstream.worker.scheduling.fair_share import SAVED_BATCHES

HOLD_S = 1.0
"""Seconds of predicted work to hold, at most half the queue timeout: jobs held here cannot run on other workers."""

LEAST_BATCHES = 4
"""Micro-batches to hold even if they take longer than HOLD_S; with a queue timeout, one. Fewer rows to choose from pad
more."""

HOLD_BATCHES = 8
"""Micro-batches of rows to hold at most."""

REALTIME, NORMAL = 0, 1
"""Positions of these jobs in PRIORITIES."""


class Batches:
    """Budgets of claims into `pool`, by the `cost` of a forward."""

    def __init__(self, pool: Pool[Prepared], cost: ForwardCost) -> None:
        self._pool = pool
        self._cost = cost
        self.limit(None)

    def limit(self, queue_timeout_s: float | None, is_fair: bool = False) -> None:
        """Applies changed limits. `is_fair`: tenants share the claims, so one micro-batch is held.

        A job of a tenant that just came waits for all that is held here.
        """
        self._hold_s = HOLD_S if queue_timeout_s is None else min(HOLD_S, queue_timeout_s / 2)
        self._least_batches = LEAST_BATCHES if queue_timeout_s is None else 1
        self._hold_batches = HOLD_BATCHES
        if is_fair:
            self._hold_s, self._least_batches, self._hold_batches = 0.0, 1, 1

    def room(
        self, held: int, empty_handed: bool, live_workers: int, max_attempts: int, last_job: tuple[int, int]
    ) -> ClaimBudget | None:
        """Budget of a claim now; None if the pool is full. The arguments are those of ClaimBudget."""
        budget, waiting = self._cost.budget, self._pool.count
        most = max(self._least_batches * budget.tokens, self._cost.tokens_in(self._hold_s))
        rows, tokens = self._hold_batches * budget.rows - waiting, most - self._pool.tokens
        if rows <= 0 or tokens <= 0:
            return None
        return ClaimBudget(
            jobs=min(MAX_JOBS_PER_CALL, rows),
            rows=rows,
            tokens=tokens,
            live_workers=live_workers,
            empty_handed=empty_handed,
            held=held,
            next_rows=max(0, budget.rows - waiting) if self._pool.tokens < budget.tokens else 0,
            max_attempts=max_attempts,
            job=last_job,
            large=(SAVED_BATCHES * budget.rows, most),
        )

    def urgent_room(self) -> ClaimBudget | None:
        """Budget of a claim into a full pool, of jobs that are more urgent than what fills it.

        Realtime jobs pass all others, normal ones those of priority batch: a pool of the latter holds about a second
        of work. None if a micro-batch of realtime rows waits already.
        """
        most, realtime = self._cost.budget.rows, self._pool.waiting(REALTIME)
        if realtime >= most:
            return None
        normal = self._pool.waiting(NORMAL)
        streams, rows = (2, most - realtime - normal) if realtime + normal < most else (1, most - realtime)
        tokens = self._cost.budget.tokens
        return ClaimBudget(min(MAX_JOBS_PER_CALL, rows), rows, tokens=tokens, streams=streams, returned=streams)

    def suspect_room(self, stream: int, live_workers: int, held: int) -> ClaimBudget | None:
        """Budget of a claim of suspects of `stream`, 1 to 3, that run before the waiting rows.

        None if a waiting row is more urgent, or if more than two full windows wait: such a claim may bring other jobs
        instead of suspects, and they add up.
        """
        budget = self._cost.budget
        rows, tokens = (
            HOLD_BATCHES * budget.rows,
            2 * max(self._least_batches * budget.tokens, self._cost.tokens_in(self._hold_s)),
        )
        if any(self._pool.waiting(rank) for rank in (BY_SHARE, *range(stream - 1))):
            return None
        if self._pool.count > 2 * rows or self._pool.tokens > tokens:
            return None
        return ClaimBudget(
            jobs=min(MAX_JOBS_PER_CALL, rows),
            rows=rows,
            tokens=tokens // 2,
            live_workers=live_workers,
            empty_handed=True,
            held=held,
            next_rows=budget.rows,
        )

    def least_share(self) -> int:
        """Rows that a class saves before some of its rows run early: a few rows would need an extra forward."""
        return self._cost.budget.rows
