"""More workers: each sleeps for its forward and needs almost no CPU, so only the queue keeps them from their ideal.

A backlog is drained, so no client takes CPU meanwhile. The ideal is what the forwards alone allow. Where the machine's
cores are all busy the ideal is out of reach, and "cores busy" says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from corpus import batches
from measure import Effort, Grid, Report, Rounds, Table, Target, cpu_s
from plots import Chart
from stage import Stage, Team, echo, until

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue.pause import pause, resume
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams

COUNTS, QUICK_COUNTS = (1, 2, 4, 8, 16, 32, 64), (1, 2)
ROWS_A_JOB = 32
LENGTH = 20
A_ROW_S = 0.00001
FORWARDS_S = (0.005, 0.05)
"""Seconds a forward sleeps beside the rows' own: as short as small models take, and long enough for few cores."""

JUDGED = 32
STEADY = (0.15, 0.85)
"""Of a backlog, from when to when: a resumed worker looks four times a second, and the last jobs are uneven."""

LASTS_S, LEAST = 3.0, 0.3
"""How long a backlog lasts by the ideal, for each second of effort; fewer than LEAST of these are too few jobs."""


def service(forward_s: float) -> ServiceSpec:
    name = f"bench-{forward_s * 1_000:g}ms"
    return echo(name, f"sleep:{forward_s}+{A_ROW_S}", max_queue_size=10_000_000, max_batch_tokens=1_000_000)


def ideal(forward_s: float, count: int) -> float:
    """Rows a second that the forwards of so many workers allow."""
    return count * ROWS_A_JOB / (forward_s + ROWS_A_JOB * A_ROW_S)


def measure(stage: Stage, effort: Effort) -> Report:
    counts = QUICK_COUNTS if effort.quick else COUNTS
    rounds = Rounds()
    for forward_s in FORWARDS_S:
        spec, teams = service(forward_s), []
        for count in counts:
            teams.append(stage.workers(spec, count - len(stage.live(spec))))
            # The workers divide what waits by how many live: each has to have heard of all.
            time.sleep(2.0)
            jobs = round(LASTS_S * max(LEAST, effort.seconds) * ideal(forward_s, count) / ROWS_A_JOB)
            for _ in range(effort.repeats):
                for figure, value in drained(stage, spec, teams, jobs).items():
                    rounds.add(f"{forward_s} {count} {figure}", value)
                rounds.add(f"{forward_s} {count} ideal", ideal(forward_s, count))
        for team in teams:
            team.stop()
    return report(rounds, counts)


def drained(stage: Stage, spec: ServiceSpec, teams: Sequence[Team], jobs: int) -> Mapping[str, float]:
    """The steady part of draining `jobs`: rows a second, and how many cores were busy."""
    client, keys = stage.connection.client, stage.keys(spec)
    key = keys.stream(Priority.NORMAL)
    pause(client, keys)
    fill(stage, spec, jobs)
    pids = [stage.server.pid, *(pid for team in teams for pid in team.pids)]
    first, last = (round(jobs * (1 - share)) for share in STEADY)
    resume(client, keys)
    until(lambda: int(client.xlen(key)) <= first)
    began, start, cpu = time.perf_counter(), int(client.xlen(key)), cpu_s(pids)
    until(lambda: int(client.xlen(key)) <= last)
    rows, seconds = ROWS_A_JOB * (start - int(client.xlen(key))), time.perf_counter() - began
    busy = (cpu_s(pids) - cpu) / seconds
    until(lambda: not client.xlen(key))
    client.unlink(keys.reply("nobody"))
    return {"rate": rows / seconds, "busy": busy}


def fill(stage: Stage, spec: ServiceSpec, jobs: int) -> None:
    streams = Streams(stage.connection.client, stage.keys(spec))
    # One word each: rows of different lengths would be picked from many jobs at once, which then end all together.
    body = encode_inputs([f"{row:0{LENGTH}}" for row in range(ROWS_A_JOB)], {})
    names = [os.urandom(16).hex() for _ in range(jobs)]
    for part in batches(names, MAX_JOBS_PER_CALL):
        drafts = [Draft(name, "echo", ROWS_A_JOB, ROWS_A_JOB, body, client="nobody") for name in part]
        streams.enqueue([Group(Priority.NORMAL, drafts)])


def report(rounds: Rounds, counts: Sequence[int]) -> Report:
    tables, charts, targets = [], [], []
    for forward_s in FORWARDS_S:
        name = f"{forward_s * 1_000:g} ms"
        figures = {
            count: [rounds[f"{forward_s} {count} {each}"] for each in ("rate", "ideal", "busy")] for count in counts
        }
        rows: Grid = [
            [count, rate, allowed.median, rate.over(allowed), busy] for count, (rate, allowed, busy) in figures.items()
        ]
        note = f"A forward sleeps {name} and 10 us a row; jobs and batches of {ROWS_A_JOB} rows; a backlog."
        heading = ["workers", "rows/s", "ideal", "/ ideal", "cores busy"]
        tables.append(Table(f"Workers that sleep {name}", heading, rows, note))
        series = {
            "measured": [(float(count), rate.median) for count, (rate, _, _) in figures.items()],
            "ideal": [(float(count), allowed.median) for count, (_, allowed, _) in figures.items()],
        }
        title = f"Rows a second by workers, {name} a forward"
        charts.append(Chart(f"scale-{forward_s * 1_000:g}ms", title, "workers", "rows/s", series, log="xy"))
        if JUDGED in counts:
            rate, allowed, _ = figures[JUDGED]
            targets.append(Target(f"{JUDGED} workers that sleep {name} / ideal", rate.over(allowed), ">=", 0.9))
    return Report(tables, targets, charts)
