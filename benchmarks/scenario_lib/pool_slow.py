"""Two models take turns, and one of them gets three times slower amid the run: which deadlines are missed?

Texts to embed come every 0.1 s and keep a third of the device busy. Every 2.5 s a list to rank comes, which takes a
quarter of its target. Halfway through, each list becomes three times as long, so its work takes three times as long.
The static order, the embedding model first, keeps all targets before that. Afterwards it cannot: what the texts leave
of the device until a list is due is less than the list needs. The order by slack can, since the list begins earlier.

Both orders run in one process, one after the other, with a worker's models, windows and turns, but without a server.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from math import inf

from measure import Cell, Report, Table, Target
from stage import Stage

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.job import Address, Claim, Job, Json, Priority
from millstream.broker.contract.keys import STREAM_INDEX
from millstream.worker import models
from millstream.worker.context import Context
from millstream.worker.engines.one_shot import OneShot
from millstream.worker.engines.runner import Runner
from millstream.worker.host import DeviceShare
from millstream.worker.intake.settler import Finished
from millstream.worker.measuring.cores import cores
from millstream.worker.measuring.warmup import warm_up
from millstream.worker.models.base import Model, Prepared
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.device_turn import Work
from millstream.worker.scheduling.slack import targets
from millstream.worker.window import Window
from scenario_lib.calls import at_least, at_most
from scenario_lib.pool import MINILM, save_cross_encoder

EVERY_S: Mapping[str, float] = {"embed": 0.1, "rerank": 2.5}
"""Seconds between two jobs."""

WORK_S: Mapping[str, float] = {"embed": 0.035, "rerank": 0.2}
"""Seconds of a job in the model, before the slow-down."""

TARGETS_S: Mapping[str, float] = {"embed": 0.7, "rerank": 0.8}
SLOWER = 3
"""Factor by which a list gets longer."""

FORWARD_S = 0.05
"""Seconds of a forward: a list takes several."""

ADAPTS_S, MOST_MISSED, LEAST_MISSED, BEFORE_MISSED = 10.0, 0.02, 0.8, 0.02
"""Seconds after the slow-down from which on the order by slack must keep targets; parts of jobs that may be late, and
that must be late with the static order; part that may be late with it before."""

TEXT = "the mill grinds corn by day and by night and the river turns its wheel "


@dataclass
class Lane:
    """A model in a lane without threads, fed by the scenario. `late`: when each late job had come, and its name."""

    name: str
    model: Model
    order: float
    rows: int = 1
    answers: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.window = Window(Budget(rows=256, tokens=8192, packs=models.packs(self.model)))
        warm_up(self.model, self.window)
        self.window.targets = targets(TARGETS_S[self.name])
        self.context = Context("bench", self.window, service=self.name, order=self.order)
        self.runner = Runner(self.context, OneShot(self.model, lambda: None), self._finish)
        self._sample = self._row()

    def _row(self) -> Prepared:
        inputs: list[Json] = [TEXT * 3]
        options = dict(self.model.sample_options)
        (row,) = self.model.prepare(inputs, options)
        assert isinstance(row, Prepared), row
        return row

    def calibrate(self) -> None:
        """Finds how many rows keep the model busy for WORK_S, and cuts forwards to FORWARD_S."""
        count, seconds = 1, 0.0
        while seconds < FORWARD_S:
            count *= 2
            began = time.perf_counter()
            self.model.forward([self._sample] * count)
            seconds = time.perf_counter() - began
        self.rows = max(1, round(count * WORK_S[self.name] / seconds))
        most = max(1, round(count * FORWARD_S / seconds))
        self.window.limit(most, most * self._sample.tokens, None)

    def send(self, factor: int) -> None:
        rows = [copy(self._sample) for _ in range(self.rows * factor)]
        at, number = self.context.clock.now(), secrets.token_hex(8)
        job = Job(number, at, self.model.op, len(rows), 0, 0, 0, "bench", "", "", b"")
        address = Address(f"{STREAM_INDEX[Priority.REALTIME]}:{at}-{int(number[:6], 16)}", number, "bench")
        self.window.hold([ActiveJob(Claim(address, job), job, rows)])

    def _finish(self, finished: Finished) -> None:
        job = finished.run
        assert isinstance(job, ActiveJob)
        if finished.reply.error or finished.reply.errors:
            raise RuntimeError(str(finished.reply.error or finished.reply.errors))
        self.answers.append((job.request.at / 1000, (self.context.clock.now() - job.request.at) / 1000))
        self.window.forget([job.name])

    def wake_by(self, wake: Callable[[], None]) -> None:
        self.window.wake = wake

    def start(self) -> None: ...

    def drain(self) -> None: ...

    def stop(self) -> None: ...

    def await_settled(self) -> None: ...


class StaticTurn:
    """Gives the device to the lane whose model comes first, whatever is measured."""

    def next(self, works: Sequence[Work | None], now: float) -> int | None:
        found = [(work.order, at) for at, work in enumerate(works) if work]
        return min(found)[1] if found else None

    def end(self, place: int, seconds: float, now: float) -> None: ...


def run(stage: Stage, seconds: float) -> Report:
    cross = save_cross_encoder(stage.home / "cross")
    loaded = {
        "embed": _load("embed", ModelSpec(type="embedding", model_name=MINILM, device="cpu")),
        "rerank": _load("rerank", ModelSpec(type="reranker", model_name=str(cross), device="cpu")),
    }
    orders = {"static: embed first": True, "by slack": False}
    # In one run, and with the same arrivals: each order gets half of the time, and half of that is slow.
    found = {name: _play(loaded, seconds / len(orders), static=static) for name, static in orders.items()}
    return _report(found)


def _load(name: str, model: ModelSpec) -> Model:
    spec = ServiceSpec(name=name, model=model, model_ref=name, runtime=Runtime.of(model.type))
    return models.load(spec, "cpu", cores())


@dataclass(frozen=True, slots=True)
class Played:
    """Jobs of each lane: when each came, and its seconds until its answer. `slow_at`: time of the slow-down."""

    answers: Mapping[str, Sequence[tuple[float, float]]]
    slow_at: float

    def missed(self, lane: str, begin: float = -inf, end: float = inf) -> float:
        """Part of the jobs that came from `begin` to `end`, seconds after the slow-down, and were late."""
        late = [took > TARGETS_S[lane] for at, took in self.answers[lane] if begin <= at - self.slow_at < end]
        return sum(late) / len(late) if late else 0.0


def _play(loaded: Mapping[str, Model], seconds: float, *, static: bool) -> Played:
    lanes = [Lane(name, model, float(at)) for at, (name, model) in enumerate(loaded.items())]
    share = DeviceShare(len(lanes))
    for place, lane in enumerate(lanes):
        lane.calibrate()
        share.put(place, lane)
    if static:
        share._turn = StaticTurn()  # type: ignore[assignment]
    slow_at = time.time() + seconds / 2
    feeders = [threading.Thread(target=_feed, args=(lane, time.monotonic(), seconds)) for lane in lanes]
    for feeder in feeders:
        feeder.start()
    share.run()
    for feeder in feeders:
        feeder.join()
    return Played({lane.name: lane.answers for lane in lanes}, slow_at)


def _feed(lane: Lane, began: float, seconds: float) -> None:
    for number in range(round(seconds / EVERY_S[lane.name])):
        due = began + number * EVERY_S[lane.name]
        time.sleep(max(0.0, due - time.monotonic()))
        lane.send(SLOWER if lane.name == "rerank" and due - began >= seconds / 2 else 1)
    lane.window.close()


def _report(found: Mapping[str, Played]) -> Report:
    rows: list[list[Cell]] = [
        [
            order,
            lane,
            TARGETS_S[lane],
            len(played.answers[lane]),
            played.missed(lane, end=0.0),
            played.missed(lane, 0.0),
        ]
        for order, played in found.items()
        for lane in TARGETS_S
    ]
    heading = ["order", "model", "target s", "jobs", "late before", "late after"]
    static, slack = found.values()
    checks: list[Target] = [
        at_most("static: late lists before the slow-down", static.missed("rerank", end=0.0), BEFORE_MISSED),
        at_least("static: late lists after it", static.missed("rerank", 0.0), LEAST_MISSED),
        *(
            at_most(
                f"by slack: late jobs of {lane} from {ADAPTS_S:g} s after it", slack.missed(lane, ADAPTS_S), MOST_MISSED
            )
            for lane in TARGETS_S
        ),
    ]
    note = (
        f"A list takes {SLOWER} times as long from the middle on. Parts of jobs that were answered after their target."
    )
    return Report([Table("Jobs answered late", heading, rows, note)], checks)
