"""A tenant that floods a service with `fair`, beside five that send a job a second; and what a claim costs then."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import cast

from measure import Grid, Report, Rounds, Sample, Table, Target, percentile
from stage import Stage, echo, until

from millstream.broker.config.spec import PriorityName, ServiceSpec
from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue.claims import ClaimBudget
from millstream.broker.queue.stream_types import Group, Settlement
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams
from millstream.client import Client
from scenario_lib.calls import Ended, timed

FLOOD = 50_000
"""Jobs that the flooding tenant has waiting at the start of each part."""

OTHERS, PACE = ("ada", "bob", "cleo", "dan", "eve"), 1.0
"""The other tenants, and the jobs that each sends a second."""

MOST_BATCHES, LEAST_RATE = 2.0, 0.85
"""Micro-batches by which the p99 of the others may be longer; rows a second over those of full micro-batches."""

BATCH = 32
HABITS = "sleep:0.01+0.002"
"""A forward takes 10 ms, and 2 ms a row."""

_BODY = encode_inputs(["flood"], {})
_REPLY = b'{"v":1,"values":["flood"],"tokens":1}\n'


def run(stage: Stage, seconds: float) -> Report:
    """The others alone, beside a flood of their own priority, and beside one of priority realtime that overflows."""
    limits = {"batch_size": BATCH, "max_queue_size": 2 * FLOOD, "total_timeout": None, "fair": "tenant"}
    plain = echo("tenants", HABITS, **limits)
    overflow = {"requests": 2 * len(OTHERS), "per": "tenant", "overflow": "batch"}
    overflowing = echo("tenants-overflow", HABITS, **limits, rate_limit=overflow)
    with Client(stage.url) as client:
        team = stage.workers(plain, 1)
        client.submit(plain.name, ["first"]).result()
        alone = _call(client, plain, seconds)
        beside, batch, rate = _flooded(stage, client, plain, Priority.NORMAL, seconds)
        team.stop()
        team = stage.workers(overflowing, 1)
        client.submit(overflowing.name, ["first"]).result()
        urgent, urgent_batch, urgent_rate = _flooded(stage, client, overflowing, Priority.REALTIME, seconds)
        team.stop()
    parts = {"alone": alone, "beside a flood": beside, "beside a flood of realtime jobs": urgent}
    lines: Grid = [
        [name, len(ended), _ms(ended, 0.5), _ms(ended, 0.99), _ms(ended, 1.0)] for name, ended in parts.items()
    ]
    note = f"{len(OTHERS)} tenants, {PACE:g} a second each. {FLOOD:,} jobs of another one wait at the start of a part."
    full = 1e3 * BATCH / batch
    served: Grid = [["of the same priority", batch, rate], ["of priority realtime", urgent_batch, urgent_rate]]
    failed = sum(each.how != "answered" for ended in parts.values() for each in ended)
    return Report(
        [
            Table("Jobs of the others, ms a call", ["", "calls", "p50", "p99", "max"], lines, note),
            Table(
                "The flood",
                ["", "ms a micro-batch", "rows/s of all"],
                served,
                f"Full micro-batches: {full:.0f} rows/s.",
            ),
        ],
        [
            Target("p99 beside the flood, ms", _one(_ms(beside, 0.99)), "<=", _ms(alone, 0.99) + MOST_BATCHES * batch),
            Target(
                "p99 beside the flood of realtime jobs, ms",
                _one(_ms(urgent, 0.99)),
                "<=",
                _ms(alone, 0.99) + MOST_BATCHES * urgent_batch,
            ),
            Target("rows/s beside the flood / full micro-batches", _one(rate / full), ">=", LEAST_RATE),
            Target("calls of the others that failed", _one(failed), "<=", 0.0),
        ],
    )


def _flooded(
    stage: Stage, client: Client, spec: ServiceSpec, priority: Priority, seconds: float
) -> tuple[Sequence[Ended], float, float]:
    """Calls of the others beside the flood, ms of a micro-batch, and rows a second of all."""
    streams = Streams(stage.connection.client, stage.keys(spec))
    _fill(streams, ["flood"] * FLOOD, priority)
    before, began = _worked(stage, spec), time.monotonic()
    ended = _call(client, spec, seconds)
    until(lambda: _worked(stage, spec)[2] > before[2])
    after, passed = _worked(stage, spec), time.monotonic() - began
    streams.purge()
    busy, forwards, rows = (late - early for late, early in zip(after, before, strict=True))
    return ended, busy / max(1, forwards), rows / passed


def _worked(stage: Stage, spec: ServiceSpec) -> tuple[int, int, int]:
    """Milliseconds of forwards, their number and their rows, as the worker said at its last beat."""
    workers = stage.live(spec)
    return (
        sum(each.busy_ms for each in workers),
        sum(each.forwards for each in workers),
        sum(each.rows for each in workers),
    )


def _call(client: Client, spec: ServiceSpec, seconds: float, priority: PriorityName = "normal") -> Sequence[Ended]:
    """Each of the others sends at even times, whether or not what it sent before was answered."""

    def one(tenant: str) -> Ended:
        return timed(lambda: client.submit(spec.name, ["call"], priority=priority, tenant=tenant).result())

    began, calls = time.monotonic(), []
    with ThreadPoolExecutor(64) as pool:
        for number in range(round(seconds * PACE * len(OTHERS))):
            due = began + number / (PACE * len(OTHERS))
            time.sleep(max(0.0, due - time.monotonic()))
            calls.append(pool.submit(one, OTHERS[number % len(OTHERS)]))
        return [each.result() for each in calls]


def _fill(streams: Streams, tenants: Sequence[str], priority: Priority = Priority.NORMAL) -> None:
    for at in range(0, len(tenants), MAX_JOBS_PER_CALL):
        page = tenants[at : at + MAX_JOBS_PER_CALL]
        drafts = [Draft(os.urandom(16).hex(), "echo", 1, 1, _BODY, "nobody", tenant=tenant) for tenant in page]
        streams.enqueue([Group(priority, [draft]) for draft in drafts])


# -- what a claim costs --------------------------------------------------------------------------------------------

MANY_TENANTS, DEEP = 10_000, 10
MOST_COST, MOST_GROWTH = 1.3, 1.2
"""Time of a claim with MANY_TENANTS over one tenant, and with DEEP times as many jobs waiting."""

CLAIMED = 32
"""Jobs of a claim."""


def claims(stage: Stage, seconds: float) -> Report:
    """The server's time for a claim, by tenants and by jobs that wait; each kind in turn, for `seconds` in all."""
    jobs = 2 * MANY_TENANTS
    kinds = {
        "no fair, 1 tenant": (None, 1, jobs),
        "1 tenant": ("tenant", 1, jobs),
        f"{MANY_TENANTS:,} tenants": ("tenant", MANY_TENANTS, jobs),
        f"1 tenant, {DEEP} times the jobs": ("tenant", 1, DEEP * jobs),
    }
    queues, rounds, memory = dict[str, Streams](), Rounds(), dict[str, float]()
    for number, (name, (fair, tenants, waiting)) in enumerate(kinds.items()):
        spec = echo(f"claims-{number}", max_queue_size=2 * waiting, fair=fair)
        stage.register(spec)
        streams = Streams(stage.connection.client, stage.keys(spec))
        streams.create_groups()
        before = _memory(stage)
        _fill(streams, [f"tenant-{each % tenants}" for each in range(waiting)])
        memory[name] = (_memory(stage) - before) / waiting
        queues[name] = streams
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, streams in queues.items():
            _claim(stage, streams, rounds, name)
    one, many, deep = (rounds[f"{name} worker"] for name in list(kinds)[1:])
    lines: Grid = [
        [name, kinds[name][2], rounds[f"{name} server"], each := rounds[f"{name} worker"], each.over(one), memory[name]]
        for name in kinds
    ]
    heading = ["", "jobs waiting", "us of the server", "us of the worker", "/ 1 tenant", "bytes a job"]
    return Report(
        [Table(f"A claim of {CLAIMED} jobs", heading, lines, "The worker's time has the round trip and decoding.")],
        [
            Target(f"a claim with {MANY_TENANTS:,} tenants / with 1", many.over(one), "<=", MOST_COST),
            Target(f"a claim with {DEEP} times the jobs waiting / without", deep.over(one), "<=", MOST_GROWTH),
        ],
    )


def _claim(stage: Stage, streams: Streams, rounds: Rounds, name: str, times: int = 20) -> None:
    """Adds microseconds of the server and of the worker for a claim: the median of `times`.

    What was claimed is settled and sent anew.
    """
    limit = ClaimBudget(jobs=CLAIMED, rows=CLAIMED, tokens=10**9)
    server, worker = list[float](), list[float]()
    for _ in range(times):
        before, began = _evalsha_us(stage), time.perf_counter()
        found = streams.claim("worker", limit).claims
        worker.append(1e6 * (time.perf_counter() - began))
        server.append(_evalsha_us(stage) - before)
        assert len(found) == CLAIMED
        streams.settle([Settlement(claim.address, _REPLY) for claim in found])
        _fill(streams, [claim.job.tenant if claim.job else "" for claim in found])
    rounds.add(f"{name} server", median(server))
    rounds.add(f"{name} worker", median(worker))


def _memory(stage: Stage) -> int:
    return int(cast(Mapping[str, int], stage.connection.client.info("memory"))["used_memory"])


def _evalsha_us(stage: Stage) -> float:
    stats = cast(Mapping[str, Mapping[str, float]], stage.connection.client.info("commandstats"))
    return stats["cmdstat_evalsha"]["usec"]


def _ms(ended: Sequence[Ended], share: float) -> float:
    return 1e3 * percentile([each.seconds for each in ended], share)


def _one(value: float) -> Sample:
    return Sample((value,))
