"""Sending of a bulk run's shards: detached calls of rows of like length, which a later process finds by their keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.entry_codec import MAX_ROWS
from millstream.broker.contract.errors import BrokerUnavailable, InvalidRequest, MillstreamError, ResultExpired
from millstream.broker.transport.connection import is_transient
from millstream.client.bulk.items import Shard
from millstream.client.bulk.row_groups import RowGroup, group_rows
from millstream.client.call_options import CallOptions, find_operation
from millstream.client.calls import Calls
from millstream.client.detached import Detached
from millstream.client.row_results import RowOutcome

T = TypeVar("T")

CALL_ROWS = 1_024
"""Rows of a call at most. Several calls are in flight, so that workers never wait for the next one."""

AWAY_S = 300.0
"""Seconds for which the server may be unreachable before a run ends with BrokerUnavailable."""

PAUSE_S = 0.5
"""Seconds between two attempts while the server is unreachable or refuses jobs."""

LOSSES = 3
"""Times that the results of one call may be lost, because the server was emptied or they expired, before it fails."""


@dataclass(slots=True)
class OpenShard:
    """Shard whose rows are being computed. `outcomes` and `tokens` have those of its rows.

    `waiting` is the number of its calls.
    """

    shard: Shard
    outcomes: list[RowOutcome]
    tokens: list[int]
    waiting: int = 0
    fingerprints: set[str] = field(default_factory=set)
    calls: list[Detached] = field(default_factory=list)


@dataclass(slots=True)
class Chunk:
    """Rows of a shard that travel in one detached call, by their index in the shard. `key` names the call."""

    owner: OpenShard
    rows: Sequence[int]
    key: str
    opts: CallOptions
    detached: Detached | None = None
    jobs: int = 0


class Sending:
    """Sends the rows of a run to one service.

    `run` is the id of the run: the keys of calls, and so the ids of jobs, follow from it, the shard and the rows. So a
    process that goes on with the run gets the calls that an earlier one has sent, whether they wait, run or are done.
    `window` is the number of rows in flight at most.
    """

    def __init__(self, calls: Calls, spec: ServiceSpec, opts: CallOptions, run: str, window: int) -> None:
        self._calls, self._spec, self._opts, self._run = calls, spec, opts, run
        per_job = 1 if find_operation(spec, opts.op).streams else min(spec.runtime.batch_size, MAX_ROWS)
        # A quarter of its priority's queue at most, as all calls: others must not be refused because of a bulk run.
        self._most_jobs = max(1, spec.runtime.queue_size(opts.priority) // 4)
        # Four calls at least: while the results of one are read and written, the workers have the others.
        self._call_rows = max(1, min(CALL_ROWS, window // 4, per_job * max(1, self._most_jobs // 4)))
        self._window = window

    def may_send(self, rows: int, jobs: int) -> bool:
        """Returns whether one more call may be sent beside `rows` rows in `jobs` jobs."""
        return not jobs or (rows + self._call_rows <= self._window and jobs < self._most_jobs)

    def split(self, shard: Shard) -> Iterator[Chunk]:
        """Yields the calls of a shard, longest rows first. Rows that cannot be sent get their error at once.

        A shard without a row that can be sent gives one chunk without rows.
        """
        groups, errors = group_rows(self._calls, self._spec, self._opts, shard.rows)
        open_shard = OpenShard(shard, [errors.get(at) for at in range(len(shard.rows))], [0] * len(shard.rows))
        pieces = [piece for group in groups for piece in self._cut(group)] or [(self._opts, [])]
        open_shard.waiting = len(pieces)
        for number, (opts, rows) in enumerate(pieces):
            key = f"bulk:{self._run}:{shard.begin.shard}:{number}x{self._call_rows}:{shard.digest}"
            yield Chunk(open_shard, rows, key, opts)

    def _cut(self, group: RowGroup) -> Iterator[tuple[CallOptions, Sequence[int]]]:
        order = sorted(group.sizes, key=lambda at: (-group.sizes[at], at))
        for at in range(0, len(order), self._call_rows):
            yield group.opts, order[at : at + self._call_rows]

    def send(self, chunk: Chunk) -> None:
        """Returns when the server has accepted the chunk's jobs. Waits while it refuses them or is unreachable.

        Raises BrokerUnavailable after AWAY_S, and errors that do not pass by themselves.
        """
        if chunk.rows:
            inputs = [chunk.owner.shard.rows[at].value for at in chunk.rows]
            chunk.detached = _insist(
                lambda: self._calls.submit_detached(self._spec.name, inputs, chunk.opts, chunk.key)  # type: ignore[arg-type]
            )
            chunk.jobs = chunk.detached.jobs

    def receive(self, chunk: Chunk) -> None:
        """Waits until the chunk is computed, and puts the outcomes into its shard. Raises as `send` does."""
        if chunk.detached is not None:
            outcomes = self._wait(chunk)
            for at, outcome, tokens in zip(chunk.rows, outcomes, chunk.detached.row_tokens(), strict=True):
                chunk.owner.outcomes[at], chunk.owner.tokens[at] = outcome, tokens
            chunk.owner.fingerprints |= chunk.detached.fingerprints
            chunk.owner.calls.append(chunk.detached)
        chunk.owner.waiting -= 1

    def _wait(self, chunk: Chunk) -> list[RowOutcome]:
        """Returns the outcomes of a chunk. Sends it again if the server has lost them."""
        for _ in range(LOSSES):
            try:
                return _insist(lambda: _detached(chunk).outcomes())
            except ResultExpired:
                self.send(chunk)
        return _insist(lambda: _detached(chunk).outcomes())

    def forget(self, open_shard: OpenShard) -> None:
        """Frees the server's memory of a shard's results. They expire by themselves if the server does not answer."""
        for detached in open_shard.calls:
            detached.forget()


def _detached(chunk: Chunk) -> Detached:
    if chunk.detached is None:
        raise InvalidRequest("a call without rows has no results")
    return chunk.detached


def _insist(ask: Callable[[], T]) -> T:
    """Returns the answer of `ask`, which is asked again while the server is unreachable or refuses jobs for now."""
    away_since: float | None = None
    while True:
        try:
            return ask()
        except BrokerUnavailable as error:
            away_since = away_since or time.monotonic()
            if not is_transient(error) or time.monotonic() - away_since >= AWAY_S:
                raise
        except MillstreamError as error:
            # A queue that is full, a rate limit, a pause: they pass.
            if not error.retryable:
                raise
            away_since = None
        time.sleep(PAUSE_S)
