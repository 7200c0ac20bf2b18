"""The queue itself: an echo model, 200 B in and 1.5 kB out, beside a raw redis-py loop on the same server.

One worker process, the product at its defaults. Every run of the product is followed by the same run of the raw loop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from corpus import batches, payloads
from driver import How, Order
from measure import Effort, Grid, Report, Rounds, Sample, Table, Target, cpu_s
from plots import Chart
from reference import JOBS, fields
from stage import Driver, Stage, Team, echo, until

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue.pause import pause, resume
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams

SERVICE = echo("bench", "vector:384")
LENGTH = 200
WAYS: Sequence[How] = ("threads", "async", "map")
ASKING: Sequence[How] = ("threads", "async")
"""The ways that wait for each call by itself."""

LEVELS, QUICK_LEVELS = (1, 16, 64, 256, 1_024), (1, 16)
PROCESSES, QUICK_PROCESSES = (1, 2, 4), (1,)
AT_ONCE = 256
"""In all, where several processes share it."""

BACKLOG, QUICK_BACKLOG = 5_000, 500
Kind = Literal["client", "raw"]
KINDS: Sequence[Kind] = ("client", "raw")


@dataclass(frozen=True)
class Bench:
    """The processes of one run: a worker of each kind, and those that make load, by kind."""

    stage: Stage
    effort: Effort
    team: Team
    raw_worker: subprocess.Popen[str]
    drivers: Mapping[Kind, Sequence[Driver]]
    rounds: Rounds = field(default_factory=Rounds)

    def interleaved(self, name: str, run: Callable[[Kind], Mapping[str, float]]) -> None:
        """The product and the raw loop in turn, after one round that does not count."""
        for kind in KINDS:
            run(kind)
        for _ in range(self.effort.repeats):
            for kind in KINDS:
                for figure, value in run(kind).items():
                    self.rounds.add(f"{name} {kind} {figure}", value)

    def closed(self, name: str, order: Order, processes: int = 1) -> None:
        """Calls in a closed loop, `in_flight` of them over all processes."""
        share = replace(order, in_flight=max(1, order.in_flight // processes))
        self.interleaved(name, lambda kind: self._closed(kind, share, processes))

    def _closed(self, kind: Kind, order: Order, processes: int) -> Mapping[str, float]:
        worker, server = cpu_s(self.worker(kind)), cpu_s([self.stage.server.pid])
        for driver in self.drivers[kind][:processes]:
            driver.begin(order)
        results = [driver.end() for driver in self.drivers[kind][:processes]]
        us = 1e6 / sum(result.calls for result in results)
        return {
            "rate": sum(result.rate for result in results),
            "p50": results[0].p50,
            "p99": results[0].p99,
            "client": us * sum(result.cpu_s for result in results),
            "worker": us * (cpu_s(self.worker(kind)) - worker),
            "server": us * (cpu_s([self.stage.server.pid]) - server),
        }

    def worker(self, kind: Kind) -> list[int]:
        return self.team.workers if kind == "client" else [self.raw_worker.pid]

    def hold(self, kind: Kind) -> str:
        """Keep the worker of this kind from claiming; the stream where its jobs wait meanwhile."""
        if kind == "raw":
            os.kill(self.raw_worker.pid, signal.SIGSTOP)
            return JOBS
        pause(self.stage.connection.client, self.stage.keys(SERVICE))
        return self.stage.keys(SERVICE).stream(Priority.NORMAL)

    def release(self, kind: Kind) -> None:
        if kind == "raw":
            os.kill(self.raw_worker.pid, signal.SIGCONT)
        else:
            resume(self.stage.connection.client, self.stage.keys(SERVICE))

    def depth(self, key: str) -> int:
        return int(self.stage.connection.client.xlen(key))


def measure(stage: Stage, effort: Effort) -> Report:
    levels = QUICK_LEVELS if effort.quick else LEVELS
    processes = QUICK_PROCESSES if effort.quick else PROCESSES
    jobs = QUICK_BACKLOG if effort.quick else BACKLOG
    raw_worker = stage.python("reference.py", stage.url)
    drivers = {kind: [stage.driver(kind, SERVICE.name) for _ in range(max(processes))] for kind in KINDS}
    bench = Bench(stage, effort, stage.workers(SERVICE, 1), raw_worker, drivers)
    for way in WAYS:
        for level in levels:
            bench.closed(f"{way} {level}", Order(way, level, effort.seconds, LENGTH))
    for count in processes:
        bench.closed(f"processes {count}", Order("threads", AT_ONCE, effort.seconds, LENGTH), count)
    bench.interleaved("enqueue", lambda kind: enqueued(bench, kind, jobs))
    bench.interleaved("drain", lambda kind: drained(bench, kind, jobs))
    return report(bench.rounds, levels, processes)


def enqueued(bench: Bench, kind: Kind, jobs: int) -> Mapping[str, float]:
    """`jobs` calls that nobody serves, from the first one to the last one's arrival in the stream."""
    key, driver = bench.hold(kind), bench.drivers[kind][0]
    began = time.perf_counter()
    driver.begin(Order("send", count=jobs, length=LENGTH))
    until(lambda: bench.depth(key) >= jobs)
    seconds = time.perf_counter() - began
    driver.end()
    bench.release(kind)
    until(lambda: not bench.depth(key))
    return {"rate": jobs / seconds}


def drained(bench: Bench, kind: Kind, jobs: int) -> Mapping[str, float]:
    """A backlog of `jobs`, from the first answer to the last one; nobody reads the answers."""
    key = bench.hold(kind)
    (fill if kind == "client" else fill_raw)(bench.stage, payloads(jobs, LENGTH))
    cpu = cpu_s(bench.worker(kind))
    bench.release(kind)
    until(lambda: bench.depth(key) < jobs)
    began, left = time.perf_counter(), bench.depth(key)
    until(lambda: not bench.depth(key))
    seconds = time.perf_counter() - began
    return {"rate": left / seconds, "worker": 1e6 * (cpu_s(bench.worker(kind)) - cpu) / jobs}


def fill(stage: Stage, texts: Sequence[str]) -> None:
    streams, end = Streams(stage.connection.client, stage.keys(SERVICE)), time.monotonic() + 60.0
    for part in batches(texts, MAX_JOBS_PER_CALL):
        streams.enqueue([Group(Priority.NORMAL, [draft(text, end)]) for text in part])


def draft(text: str, end: float | None = None) -> Draft:
    """What a client sends for one text; the answer goes to a stream that nobody reads."""
    return Draft(os.urandom(16).hex(), "echo", 1, 52, encode_inputs([text], {}), client="nobody", deadline=end)


def fill_raw(stage: Stage, texts: Sequence[str]) -> None:
    for part in batches(texts, MAX_JOBS_PER_CALL):
        pipe = stage.connection.client.pipeline(transaction=False)
        for text in part:
            pipe.xadd(JOBS, fields(os.urandom(16).hex(), text, 1, "nobody"))
        pipe.execute()


def report(rounds: Rounds, levels: Sequence[int], processes: Sequence[int]) -> Report:
    tables = [in_flight(rounds, way, levels) for way in WAYS]
    tables += [alone(rounds), by_processes(rounds, processes), in_parts(rounds)]
    series = {
        f"{kind}, {way}": [(float(level), rounds[f"{way} {level} {kind} rate"].median) for level in levels]
        for way in WAYS
        for kind in KINDS
    }
    chart = Chart("queue-in-flight", "Rows a second through the queue", "in flight", "rows/s", series, log="x")
    return Report(tables, targets(rounds, levels), [chart])


def ratio(rounds: Rounds, name: str, figure: str = "rate") -> Sample:
    return rounds[f"{name} client {figure}"].over(rounds[f"{name} raw {figure}"])


def compared(rounds: Rounds, name: str, figure: str = "rate") -> list[Sample]:
    """The product's, the raw loop's, and the first over the second."""
    return [*(rounds[f"{name} {kind} {figure}"] for kind in KINDS), ratio(rounds, name, figure)]


def spent(rounds: Rounds, name: str, figures: Sequence[str]) -> list[float]:
    return [sample.median for kind in KINDS for sample in rounds.of(f"{name} {kind}", figures)]


def in_flight(rounds: Rounds, way: How, levels: Sequence[int]) -> Table:
    cpus = ("client", "worker", "server")
    heading = ["in flight", "rows/s", "raw rows/s", "/ raw", *(f"{each} us" for each in cpus)]
    heading += [f"raw {each} us" for each in cpus]
    rows: Grid = [
        [level, *compared(rounds, f"{way} {level}"), *spent(rounds, f"{way} {level}", cpus)] for level in levels
    ]
    notes = {
        "threads": "Client.submit(...).result() from so many threads of one process",
        "async": "AsyncClient.submit from so many tasks of one process",
        "map": "Client.map with such a window, several rows a job (as many in the raw loop)",
    }
    return Table(f"Queue, end to end: {way}", heading, rows, f"{notes[way]}; us are CPU time a row.")


def alone(rounds: Rounds) -> Table:
    rows: Grid = [[way, *compared(rounds, f"{way} 1", "p50"), *compared(rounds, f"{way} 1", "p99")] for way in ASKING]
    heading = ["way", "p50 ms", "raw p50 ms", "/ raw", "p99 ms", "raw p99 ms", "/ raw"]
    return Table("Queue, one call at a time", heading, rows)


def by_processes(rounds: Rounds, processes: Sequence[int]) -> Table:
    rows: Grid = [[count, *compared(rounds, f"processes {count}")] for count in processes]
    title = f"Queue, end to end: {AT_ONCE} in flight over several client processes"
    return Table(title, ["processes", "rows/s", "raw rows/s", "/ raw"], rows, "Threads; still one worker process.")


def in_parts(rounds: Rounds) -> Table:
    rows: Grid = [
        ["enqueue only, jobs/s", *compared(rounds, "enqueue")],
        ["drain only, jobs/s", *compared(rounds, "drain")],
        ["drain only, worker CPU us a job", *compared(rounds, "drain", "worker")],
    ]
    return Table("Queue, each half alone", ["what", "millstream", "raw", "/ raw"], rows)


def targets(rounds: Rounds, levels: Sequence[int]) -> list[Target]:
    found = [
        Target(f"{level} in flight, threads: jobs/s / raw loop", ratio(rounds, f"threads {level}"), ">=", least)
        for level, least in ((256, 0.5), (64, 0.4))
        if level in levels
    ]
    found.append(Target("one at a time, threads: p50 / raw loop", ratio(rounds, "threads 1", "p50"), "<=", 2.2))
    return [*found, Target("worker CPU a job, echo, backlog, us", rounds["drain client worker"], "<=", 40.0)]
