"""A second `millstream worker run` joins in the middle of one call of 5,000 texts, does its part, and drains amid it.

The real all-MiniLM-L6-v2, one torch thread a worker; or an echo whose forwards sleep, which other load does not slow
down. Batches of 16: the shorter its forwards, the more of them a worker holds, until a call's window has nothing left
for another one. Shares are counted from 2 s after the second worker is ready until it is told to drain (SIGTERM), once
most of the call is done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench_embed import MODEL
from corpus import payloads
from measure import Cell, Report, Table
from stage import Stage, Team, echo, until

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.inspector import WorkerView
from millstream.client import Client
from millstream.client.handle import Handle
from scenario_lib.calls import at_least, at_most

RUNTIME = {"batch_size": 16, "worker_count": 1}
MINILM = ServiceSpec(
    name="join",
    model=ModelSpec(type="embedding", model_name=MODEL, device="cpu"),
    model_ref="minilm",
    runtime=Runtime.model_validate(RUNTIME),
)
SLEEPING = echo("join", "sleep:0.02+0.004", **RUNTIME)
TEXTS, LENGTH = 5_000, 200
FIRST_PART, LAST_PART = 0.05, 0.85
"""The second process starts and is told to drain when so much of the call is done."""

JOINED_S = 2.0
"""Seconds that a worker may take from being ready to doing its part."""

LEAST_SHARE, DRAIN_S = 0.4, 2.0
LEAST_COUNTED = 640
"""Rows counted, below which a share says nothing: the second worker was ready too late."""

WAIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Joined:
    """`rows` are those that the first and the second worker ran in the time counted."""

    ready_at: int
    rows: tuple[int, int]
    drain_s: float
    batch_s: float
    complete: bool


def run(stage: Stage, seconds: float) -> Report:
    return _report(_run(stage, MINILM, seconds))


def run_echo(stage: Stage, seconds: float) -> Report:
    return _report(_run(stage, SLEEPING, seconds))


def _run(stage: Stage, spec: ServiceSpec, seconds: float) -> Joined:
    with _one_core():
        first = stage.workers(spec, 1)
    _spread(first)
    texts = payloads(TEXTS, LENGTH)
    with Client(stage.url) as client:
        client.submit(spec.name, texts[:64]).result()
        return _join(stage, spec, client.submit(spec.name, texts, timeout=2 * seconds), first)


def _join(stage: Stage, spec: ServiceSpec, handle: Handle, first: Team) -> Joined:
    until(lambda: handle.rows_done >= FIRST_PART * TEXTS, within_s=WAIT_S)
    with _one_core():
        second = stage.workers(spec, 1)
    _spread(second)
    ready_at = handle.rows_done
    time.sleep(JOINED_S)
    before = _views(stage, spec, first, second)
    until(lambda: handle.rows_done >= LAST_PART * TEXTS, within_s=WAIT_S)
    after = _views(stage, spec, first, second)
    began = time.monotonic()
    second.process.terminate()
    second.process.wait(WAIT_S)
    drain_s = time.monotonic() - began
    rows = [now.rows - then.rows for now, then in zip(after, before, strict=True)]
    batch_s = max(each.busy_ms / max(1, each.forwards) / 1_000 for each in after)
    return Joined(ready_at, (rows[0], rows[1]), drain_s, batch_s, len(handle.result(WAIT_S)) == TEXTS)


def _views(stage: Stage, spec: ServiceSpec, *teams: Team) -> Sequence[WorkerView]:
    """The worker of each team, read just after one of them has beaten: each beats once a second."""
    then = {view.pid: view.beat_age_ms for view in stage.live(spec)}
    until(lambda: any(view.beat_age_ms < then.get(view.pid, 0) for view in stage.live(spec)), within_s=10.0)
    views = {view.pid: view for view in stage.live(spec)}
    return [views[pid] for team in teams for pid in team.workers]


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this thread, and what it starts, on one core: a supervisor gives its worker a torch thread for each."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _spread(team: Team) -> None:
    """Let all threads of these processes run on every core again; how many they are is settled."""
    for task in (task for pid in team.pids for task in Path(f"/proc/{pid}/task").iterdir()):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), os.sched_getaffinity(0))


def _report(joined: Joined) -> Report:
    counted = sum(joined.rows)
    share = joined.rows[1] / counted if counted else float("nan")
    rows: list[list[Cell]] = [
        ["rows done when the second worker was ready", joined.ready_at],
        [f"rows of the first worker from {JOINED_S:g} s later", joined.rows[0]],
        [f"rows of the second worker from {JOINED_S:g} s later", joined.rows[1]],
        ["mean forward, s", joined.batch_s],
        ["drain of the second worker, s", joined.drain_s],
    ]
    targets = [
        at_least("share of the second worker", share, LEAST_SHARE),
        at_least("rows counted", counted, LEAST_COUNTED),
        at_most("drain, s", joined.drain_s, joined.batch_s + DRAIN_S),
        at_least("the call is complete", joined.complete, 1),
    ]
    return Report([Table(f"A worker joins a call of {TEXTS:,} texts", ["what", "measured"], rows)], targets)
