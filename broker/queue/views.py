"""The inspector's figures of services and workers, and the ratios computed from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millstream.broker.contract.job import Priority
from millstream.broker.queue.announced import Announced
from millstream.broker.queue.drains import Order
from millstream.broker.queue.pause import Pause
from millstream.broker.queue.supervisors import SupervisorView


@dataclass(frozen=True, slots=True)
class WorkerView:
    """The status of a live worker process at its last heartbeat. Counts start when it is ready, `age_ms` before that.

    `running` is the number of jobs in the current forward, which started `running_ms` ago. `past` says how the process
    that this one replaced ended, "" if there was none. `batch_tokens` is the limit of padded tokens of a forward, 0 if
    unknown. `text_tokens` is the limit of tokens of a text, 0 if there is none or it is unknown. `threads` is the
    number of CPU threads of a forward, 0 if it does not run on the CPU. `cuts` counts forwards by what ended their
    batch: rows, tokens, time, padding, arrival. Of a process of a pool: `resident` says whether the model is in memory,
    `memory` how many bytes it takes, 0 if unknown, and `loads_minute` how often it was loaded in the last minute of all
    `loads`.
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
    resident: bool = True
    memory: int = 0
    loads: int = 0
    loads_minute: int = 0

    @property
    def rows_per_s(self) -> float | None:
        """Rows per second since it was ready; None if `age_ms` is 0."""
        return self.rows * 1000 / self.age_ms if self.age_ms else None

    @property
    def busy(self) -> float | None:
        """Share of the time since it was ready in which a forward ran, 0 to 1; None if `age_ms` is 0."""
        return min(1.0, self.busy_ms / self.age_ms) if self.age_ms else None

    @property
    def padding(self) -> float | None:
        """Padded tokens for each token of the inputs: 1.0 means no padding; None before the first forward."""
        return self.padded / self.tokens if self.tokens else None


@dataclass(frozen=True, slots=True)
class ServiceView:
    """The state of one service.

    Each unsettled job counts once: `waiting` for its first claim, by priority; `held` by a live or lost worker, by
    consumer; or `returned`, waiting again after a worker gave it back. `oldest_ms` is the age of the oldest of them, by
    the server's clock. `refused` counts refused calls by reason; it restarts after a day without one. `supervisors` are
    those of the last day that did not end in order. `unsettled` counts the jobs of each priority, which
    `max_queue_size` limits. `drained` has the order of each worker and host that an operator keeps empty.
    `deadline_ms`: ms to the nearest deadline of the oldest job of each priority, below 0 if it has passed; None if none
    of them has one. `announced`: announcements that wait for their webhooks.
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
    supervisors: Sequence[SupervisorView] = ()
    unsettled: Mapping[Priority, int] = field(default_factory=dict)
    drained: Mapping[str, Order] = field(default_factory=dict)
    deadline_ms: int | None = None
    announced: Announced = field(default_factory=Announced)

    @property
    def in_flight(self) -> int:
        """Number of jobs that are claimed and not settled."""
        return sum(self.held.values())

    @property
    def depth(self) -> int:
        """Number of jobs that no worker holds."""
        return sum(self.waiting.values()) + self.returned

    @property
    def forwards(self) -> int:
        """Number of forwards of the live workers."""
        return sum(worker.forwards for worker in self.workers)

    @property
    def rows_per_forward(self) -> float | None:
        """Mean rows of the live workers' forwards; None before the first."""
        return sum(worker.rows for worker in self.workers) / self.forwards if self.forwards else None

    @property
    def cuts(self) -> Mapping[str, int]:
        """Forwards of the live workers by what ended their batch, as in WorkerView.cuts."""
        total: Counter[str] = Counter()
        for worker in self.workers:
            total.update(worker.cuts)
        return total

    @property
    def padding(self) -> float | None:
        """Padded tokens for each token of the inputs: 1.0 means no padding; None before the first forward."""
        tokens = sum(worker.tokens for worker in self.workers)
        return sum(worker.padded for worker in self.workers) / tokens if tokens else None
