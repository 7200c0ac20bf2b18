"""Objects that the threads of one lane share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from millstream.telemetry.worker_traces import WorkerTraces
from millstream.worker.clock import ServerClock
from millstream.worker.measuring.threads import Threads
from millstream.worker.scheduling.counters import Counters
from millstream.worker.scheduling.histograms import Histograms
from millstream.worker.shutdown import Shutdown
from millstream.worker.stage_gate import Stage
from millstream.worker.supervision.progress import Progress
from millstream.worker.window import Window


@dataclass(frozen=True, slots=True)
class Context:
    """One lane of a worker process: consumer name, window, clock, counters, shutdown, progress page, thread count.

    A supervisor reads `progress`, if the process has one. `beside`: pages of the other lanes of the process.
    `stage` wraps each stage of this lane, if the process has several lanes. `service` is the name of its service.
    `traces` makes its spans, if it exports any. `order`: its model's `priority`, by which late lanes take turns.
    `figures` returns further fields for its heartbeat. `number` counts the lanes of its service in this process,
    from 0.
    """

    consumer: str
    window: Window
    clock: ServerClock = field(default_factory=ServerClock)
    counters: Counters = field(default_factory=Counters)
    histograms: Histograms = field(default_factory=Histograms)
    shutdown: Shutdown = field(default_factory=Shutdown)
    progress: Progress = field(default_factory=Progress.alone)
    threads: Threads = field(default_factory=Threads.unmanaged)
    beside: Sequence[Progress] = ()
    stage: Stage | None = None
    service: str = ""
    traces: WorkerTraces | None = None
    order: float = math.inf
    figures: Callable[[], Mapping[str, str | int]] = dict
    number: int = 0

    @property
    def is_stuck(self) -> bool:
        """Whether a thread of any lane is stuck: then the process is about to end."""
        return self.progress.is_stuck or any(page.is_stuck for page in self.beside)

    def counts(self) -> dict[str, int]:
        """Returns all that this lane counts for the metrics of its service, by field."""
        return self.counters.work() | self.histograms.counts()
