"""What the inspector saw of a service and its workers, and what follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.contract.job import Priority
from millstream.broker.queue.pause import Pause


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What a live worker process said at its last beat; the counts are since it was ready, `age_ms` before that beat.

    `running` jobs are in the forward under way, for `running_ms`. `past` says how the process before it in its place
    ended; empty where there was none. `batch_tokens` is the most padded tokens of a forward, 0 where it does not say;
    `text_tokens` is the most tokens of a text, 0 if there is no limit or it does not say;
    `threads` is how many its forwards run on, 0 if that is not on the CPU;
    `cuts` has the forwards by what ended their batch: rows, tokens, time, padding, arrival.
    """

    consumer: str
    state: str
    host: str
    pid: int
    device: str
    fingerprint: str
    beat_age_ms: int
    age_ms: int
    running: int
    running_ms: int
    past: str
    jobs: int
    rows: int
    forwards: int
    tokens: int
    padded: int
    errors: int
    late: int
    busy_ms: int
    batch_tokens: int
    text_tokens: int
    threads: int
    cuts: Mapping[str, int]

    @property
    def rows_per_s(self) -> float | None:
        """Rows a second over its life; None before it has one."""
        return self.rows * 1000 / self.age_ms if self.age_ms else None

    @property
    def busy(self) -> float | None:
        """The share of its life, 0 to 1, in which a forward ran; None before it has one."""
        return min(1.0, self.busy_ms / self.age_ms) if self.age_ms else None

    @property
    def padding(self) -> float | None:
        """As ServiceView.padding."""
        return self.padded / self.tokens if self.tokens else None


@dataclass(frozen=True, slots=True)
class ServiceView:
    """One service at one moment.

    Every unsettled job counts once: `waiting` for its first claim, `held` by a live or lost worker (by consumer), or
    `returned` from a dead one and waiting again. `oldest_ms` is the age of the oldest of them, by the server's clock.
    While it is `paused` its workers claim nothing. `refused` counts, by reason, the calls that were turned away at
    first; it starts anew after a day without any.
    """

    name: str
    waiting: Mapping[Priority, int]
    held: Mapping[str, int]
    returned: int
    oldest_ms: int | None
    workers: Sequence[WorkerView]
    dead_letters: int
    paused: Pause | None
    refused: Mapping[str, int]

    @property
    def in_flight(self) -> int:
        """Jobs claimed and not settled."""
        return sum(self.held.values())

    @property
    def depth(self) -> int:
        """Jobs nobody holds."""
        return sum(self.waiting.values()) + self.returned

    @property
    def forwards(self) -> int:
        """Batches over the lives of the live workers."""
        return sum(worker.forwards for worker in self.workers)

    @property
    def rows_per_forward(self) -> float | None:
        """The mean batch, over the lives of the live workers; None before their first."""
        return sum(worker.rows for worker in self.workers) / self.forwards if self.forwards else None

    @property
    def cuts(self) -> Mapping[str, int]:
        """The batches of the live workers by what ended them, as WorkerView.cuts."""
        total: Counter[str] = Counter()
        for worker in self.workers:
            total.update(worker.cuts)
        return total

    @property
    def padding(self) -> float | None:
        """Tokens computed for each token that was asked for: 1.0 pads nothing; None before the first forward."""
        tokens = sum(worker.tokens for worker in self.workers)
        return sum(worker.padded for worker in self.workers) / tokens if tokens else None
