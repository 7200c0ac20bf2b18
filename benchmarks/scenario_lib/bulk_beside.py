"""A bulk run of real texts beside callers of single texts: what they cost each other.

The callers send at even times, half of them with priority realtime, half with the usual one. Callers alone, the run
alone and both together take turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from corpus import mix
from measure import Grid, Report, Rounds, Table, Target, percentile
from stage import Stage, echo

from millstream.broker.config.spec import PriorityName, ServiceSpec
from millstream.client import Client
from scenario_lib.bulk import Run, minilm, write_input
from scenario_lib.calls import at_least, at_most

SERVICE = "bulk"
ROUNDS, FEW_TEXTS, CALL_WORDS = 2, 1_000, 8
"""Rounds, and the texts below which there is one; words of a call's text."""

CALLS_SHARE, LEAST_CALLS_PER_S, MOST_CALLS_PER_S = 0.05, 2.0, 10.0
"""Calls for each text of the run alone, but so many a second: callers are to be a small part of the load."""

MOST_BATCHES, LEAST_RATE = 2.0, 0.85
"""Micro-batches by which the p99 of callers may be longer beside the run, and rate of the run beside them / alone."""


@dataclass
class Calls:
    """Latencies in ms, and calls that failed."""

    ms: list[float] = field(default_factory=list)
    failed: int = 0

    def make(self, client: Client, text: str, priority: PriorityName) -> None:
        began = time.perf_counter()
        try:
            client.submit(SERVICE, [text], priority=priority).result()
            self.ms.append(1e3 * (time.perf_counter() - began))
        except Exception:  # noqa: BLE001 - counted
            self.failed += 1


def run(stage: Stage, rows: int) -> Report:
    return _run(stage, rows, minilm(SERVICE))


def run_echo(stage: Stage, rows: int) -> Report:
    """As `run`, with forwards that sleep: what is left is the queue's own part."""
    return _run(stage, rows, echo(SERVICE, "vector:384,sleep:0.005+0.0015", batch_size=64, max_batch_tokens=100_000))


def _run(stage: Stage, rows: int, spec: ServiceSpec) -> Report:
    stage.workers(spec, 1)
    source, rounds, alone, beside = stage.home / "in.jsonl", Rounds(), Calls(), Calls()
    write_input(source, mix(rows))
    with Client(stage.url) as client:
        client.submit(SERVICE, ["first"]).result()
        for number in range(ROUNDS if rows >= FEW_TEXTS else 1):
            before = _forwards(stage, spec)
            seconds = _complete(stage, rows, f"alone-{number}")
            after = _forwards(stage, spec)
            rounds.add("batch", (after[0] - before[0]) / max(1, after[1] - before[1]))
            rounds.add("alone", rows / seconds)
            pace = min(MOST_CALLS_PER_S, max(LEAST_CALLS_PER_S, CALLS_SHARE * rows / seconds))
            over = threading.Event()
            threading.Timer(seconds, over.set).start()
            _call(client, over.is_set, alone, pace)
            rounds.add("beside", rows / _beside(stage, client, rows, f"beside-{number}", beside, pace))
    return _report(rows, rounds, alone, beside)


def _complete(stage: Stage, rows: int, name: str) -> float:
    return Run(stage, SERVICE, stage.home / "in.jsonl", stage.home / name).complete().seconds


def _beside(stage: Stage, client: Client, rows: int, name: str, calls: Calls, pace: float) -> float:
    with ThreadPoolExecutor(1) as pool:
        seconds = pool.submit(_complete, stage, rows, name)
        _call(client, seconds.done, calls, pace)
        return seconds.result()


def _call(client: Client, over: Callable[[], bool], calls: Calls, pace: float) -> None:
    """Sends `pace` texts a second until it is over, whether or not the ones before were answered."""
    texts = [" ".join(text.split()[:CALL_WORDS]) for text in mix(100)]
    began, number = time.monotonic(), 0
    with ThreadPoolExecutor(32) as pool:
        while not over():
            pool.submit(calls.make, client, texts[number % 100], "realtime" if number % 2 else "normal")
            number += 1
            time.sleep(max(0.0, began + number / pace - time.monotonic()))


def _forwards(stage: Stage, spec: ServiceSpec) -> tuple[int, int]:
    """Milliseconds of forwards and their number, as the worker said at its last beat."""
    workers = stage.live(spec)
    return sum(each.busy_ms for each in workers), sum(each.forwards for each in workers)


def _report(rows: int, rounds: Rounds, alone: Calls, beside: Calls) -> Report:
    batch, ratio = rounds["batch"].median, rounds["beside"].over(rounds["alone"])
    limit = percentile(alone.ms, 0.99) + MOST_BATCHES * batch
    shares = {"p50": 0.5, "p99": 0.99}
    lines: Grid = [[name, percentile(alone.ms, at), percentile(beside.ms, at)] for name, at in shares.items()]
    note = f"{len(alone.ms)} calls alone, {len(beside.ms)} beside; a micro-batch of the run takes {batch:.1f} ms."
    tables = [
        Table("Single texts, ms a call", ["", "alone", "beside the run"], lines, note),
        Table(
            f"A bulk run of {rows:,} texts",
            ["", "texts/s"],
            [["alone", rounds["alone"]], ["beside callers", rounds["beside"]], ["beside / alone", ratio]],
        ),
    ]
    targets = [
        at_most("p99 of callers beside the run, ms", percentile(beside.ms, 0.99), limit),
        Target("the run beside callers / alone", ratio, ">=", LEAST_RATE),
        at_most("calls that failed", alone.failed + beside.failed, 0),
        at_least("calls, of the fewer", min(len(alone.ms), len(beside.ms)), 1),
    ]
    return Report(tables, targets)
