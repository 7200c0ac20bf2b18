"""Sending of a bulk run's rows: detached calls of rows of like length, which a later process finds by their keys."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.entry_codec import MAX_ROWS
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    MillstreamError,
    ResultExpired,
)
from millstream.broker.contract.job import Json
from millstream.broker.transport.connection import is_transient
from millstream.client.bulk.items import Row, Shard
from millstream.client.bulk.row_groups import RowGroup, group_rows
from millstream.client.call_options import CallOptions, find_operation
from millstream.client.calls import Calls
from millstream.client.detached import Detached
from millstream.client.row_results import RowOutcome

T = TypeVar("T")

CALL_ROWS, CALL_BYTES = 1_024, 4 * 1024 * 1024
"""Rows and bytes of a call at most. Several calls are in flight, so that workers never wait for the next one."""

IN_FLIGHT_BYTES = 64 * 1024 * 1024
"""Bytes of the rows in flight at most: the memory of a run does not depend on the length of its rows."""

LOOK_S = 2.0
"""Seconds between two reports of the progress while a call is computed. Each begins with a few quick looks."""

AWAY_S = 300.0
"""Seconds for which the server may be unreachable before a run ends with BrokerUnavailable."""

PAUSE_S = 0.5
"""Seconds between two attempts while the server is unreachable or refuses jobs."""

LOSSES = 3
"""Times that the results of one call may be lost, because the server was emptied or they expired, before it fails."""


@dataclass(slots=True)
class Group:
    """Shards whose rows are sorted together, and so finish together. `outcomes`, `tokens` have those of all rows.

    `waiting` is the number of calls without results; `done` rows have an outcome, `failed` of them an error. `work` is
    the size of all rows that are sent, bytes, `worked` of those with an outcome.
    """

    shards: Sequence[Shard]
    rows: Sequence[Row]
    outcomes: list[RowOutcome]
    tokens: list[int]
    done: int
    failed: int
    waiting: int = 0
    work: int = 0
    worked: int = 0
    fingerprints: set[str] = field(default_factory=set)
    calls: list[Detached] = field(default_factory=list)

    def by_shard(self) -> Iterator[tuple[Shard, Sequence[RowOutcome], Sequence[int]]]:
        """Yields each shard with the outcomes and the tokens of its rows."""
        outcomes, tokens = iter(self.outcomes), iter(self.tokens)
        for shard in self.shards:
            count = len(shard.rows)
            yield shard, list(islice(outcomes, count)), list(islice(tokens, count))


@dataclass(slots=True)
class Chunk:
    """Rows of a group that travel in one detached call, by their index. `size` is in bytes; `key` names the call."""

    owner: Group
    rows: Sequence[int]
    size: int
    key: str
    opts: CallOptions
    detached: Detached | None = None
    received: bool = False

    @property
    def jobs(self) -> int:
        """Number of jobs of the call; 0 before it was sent."""
        return self.detached.jobs if self.detached else 0

    @property
    def answered(self) -> float:
        """Share, about, of its rows whose answers were read but are not in the group yet, 0 to 1."""
        if self.detached is None or self.received:
            return 0.0
        return self.detached.answered / self.detached.jobs


class Sending:
    """Sends the rows of a run to one service.

    `run` is the id of the run: the keys of calls, and so the ids of jobs, follow from it, the shards and the rows. So a
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

    def may_send(self, in_flight: Collection[Chunk]) -> bool:
        """Returns whether one more call may be sent beside those `in_flight`."""
        rows, jobs = sum(len(each.rows) for each in in_flight), sum(each.jobs for each in in_flight)
        if sum(each.size for each in in_flight) >= IN_FLIGHT_BYTES:
            return False
        return not jobs or (rows + self._call_rows <= self._window and jobs < self._most_jobs)

    def compute(self, chunks: Iterator[Chunk], report: Callable[[Chunk], object]) -> Iterator[Chunk]:
        """Yields each call once it has results, in order. Sends as many at once as may be in flight.

        `report` is called with the oldest call while it is computed. Raises as `send` and `receive`.
        """
        in_flight: deque[Chunk] = deque()
        following = next(chunks, None)
        while following or in_flight:
            while following and self.may_send(in_flight):
                self.send(following)
                in_flight.append(following)
                following = next(chunks, None)
            chunk = in_flight.popleft()
            self.receive(chunk, partial(report, chunk))
            yield chunk

    def split(self, shards: Sequence[Shard]) -> Iterator[Chunk]:
        """Yields the calls of a group of shards, longest rows first. Rows that cannot be sent get their error at once.

        A group without a row that can be sent gives one chunk without rows.
        """
        rows = [row for shard in shards for row in shard.rows]
        groups, errors = group_rows(self._calls, self._spec, self._opts, rows)
        outcomes: list[RowOutcome] = [errors.get(at) for at in range(len(rows))]
        group = Group(shards, rows, outcomes, [0] * len(rows), len(errors), len(errors))
        pieces = [piece for each in groups for piece in self._cut(each)] or [(self._opts, [], 0)]
        group.waiting, group.work = len(pieces), sum(size for _, _, size in pieces)
        digest = hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()
        place = f"{shards[0].begin.shard}+{len(shards)}"
        for number, (opts, piece, size) in enumerate(pieces):
            key = f"bulk:{self._run}:{place}:{number}x{self._call_rows}:{digest}"
            yield Chunk(group, piece, size, key, opts)

    def _cut(self, group: RowGroup) -> Iterator[tuple[CallOptions, Sequence[int], int]]:
        """Yields the calls of rows with equal options: their options, rows, and bytes."""
        order = sorted(group.sizes, key=lambda at: (-group.sizes[at], at))
        for piece, size in _cut(order, group.sizes, self._call_rows):
            yield group.opts, piece, size

    def send(self, chunk: Chunk) -> None:
        """Returns when the server has accepted the chunk's jobs. Waits while it refuses them or is unreachable.

        Raises BrokerUnavailable after AWAY_S, and errors that do not pass by themselves.
        """
        if chunk.rows:
            inputs = [chunk.owner.rows[at].value for at in chunk.rows]
            chunk.detached = _insist(
                lambda: self._submit(inputs, chunk.opts, chunk.key)  # type: ignore[arg-type]
            )

    def _submit(self, inputs: Sequence[Json], opts: CallOptions, key: str) -> Detached:
        # Not by the name alone: a route of the same name would choose the service again.
        opts = opts.validate()
        spec = self._calls.services.read(self._spec.name)
        return self._calls.submit_to(spec, inputs, opts, None, key)

    def receive(self, chunk: Chunk, report: Callable[[], object]) -> None:
        """Waits until the chunk is computed, and puts the outcomes into its group. Raises as `send` does.

        Calls `report` every LOOK_S seconds.
        """
        group = chunk.owner
        if chunk.detached is not None:
            outcomes = self._wait(chunk, report)
            for at, outcome, tokens in zip(chunk.rows, outcomes, chunk.detached.row_tokens(), strict=True):
                group.outcomes[at], group.tokens[at] = outcome, tokens
            group.done += len(outcomes)
            group.worked += chunk.size
            group.failed += sum(isinstance(outcome, MillstreamError) for outcome in outcomes)
            group.fingerprints |= chunk.detached.fingerprints
            group.calls.append(chunk.detached)
        group.waiting -= 1
        chunk.received = True

    def _wait(self, chunk: Chunk, report: Callable[[], object]) -> list[RowOutcome]:
        """Returns the outcomes of a chunk. Sends it again if the server has lost them, up to LOSSES times."""
        losses = 0
        while True:
            try:
                outcomes = _insist(partial(_look, chunk))
            except ResultExpired:
                losses += 1
                if losses > LOSSES:
                    raise
                self.send(chunk)
            else:
                if outcomes is not None:
                    return outcomes
                report()

    def forget(self, group: Group) -> None:
        """Frees the server's memory of a group's results. They expire by themselves if the server does not answer."""
        for detached in group.calls:
            detached.forget()


def _cut(order: Sequence[int], sizes: Mapping[int, int], most_rows: int) -> list[tuple[list[int], int]]:
    """Cuts rows into pieces of at most `most_rows` rows and about CALL_BYTES. Returns each piece with its bytes."""
    pieces: list[tuple[list[int], int]] = []
    piece, total = list[int](), 0
    for at in order:
        if piece and (len(piece) == most_rows or total + sizes[at] > CALL_BYTES):
            pieces.append((piece, total))
            piece, total = [], 0
        piece.append(at)
        total += sizes[at]
    return [*pieces, (piece, total)] if piece else pieces


def _look(chunk: Chunk) -> list[RowOutcome] | None:
    """Returns the outcomes of a chunk; None if it is not computed within LOOK_S."""
    if chunk.detached is None:
        raise InvalidRequest("a call without rows has no results")
    try:
        return chunk.detached.outcomes(LOOK_S)
    except DeadlineExceeded:
        return None


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
