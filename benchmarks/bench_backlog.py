"""A long queue: does a job cost more where a million others wait, and how much memory does each one take?

Filled by script calls, without a client. The sizes take turns, each with a service of its own on the same server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import cast

from corpus import payloads
from measure import Effort, Grid, Report, Rounds, Table, Target
from plots import Chart
from stage import Stage, echo, until

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.codec import encode_inputs, encode_reply
from millstream.broker.contract.job import Draft, Priority, Reply
from millstream.broker.queue.claims import ClaimBudget
from millstream.broker.queue.stream_types import Group, Settlement
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams

SIZES, QUICK_SIZES = (1_000, 100_000, 1_000_000), (1_000, 5_000)
JOBS, QUICK_JOBS = 5_000, 512
"""Claimed and settled in each round; as many follow, so that the backlog keeps its size."""

LENGTH = 200
_BODY = encode_inputs(payloads(1, LENGTH), {})
_ANSWER = encode_reply(Reply(values=[""]))


def measure(stage: Stage, effort: Effort) -> Report:
    sizes = QUICK_SIZES if effort.quick else SIZES
    jobs = QUICK_JOBS if effort.quick else JOBS
    rounds = Rounds()
    queues: dict[int, Streams] = {}
    for size in sizes:
        spec = echo(f"bench-{size}", max_queue_size=10 * size)
        queues[size] = opened(stage, spec)
        before = memory(stage)
        fill(queues[size], size)
        settle_down(stage)
        rounds.add(f"{size} bytes", (memory(stage) - before) / size - len(_BODY))
    for streams in queues.values():
        served(streams, jobs)
    for _ in range(effort.repeats):
        for size, streams in queues.items():
            for figure, value in served(streams, jobs).items():
                rounds.add(f"{size} {figure}", value)
    return report(rounds, sizes)


def opened(stage: Stage, spec: ServiceSpec) -> Streams:
    stage.register(spec)
    streams = Streams(stage.connection.client, stage.keys(spec))
    streams.create_groups()
    return streams


def fill(streams: Streams, count: int) -> None:
    while count > 0:
        part = min(count, MAX_JOBS_PER_CALL)
        # As batch jobs of a client are by default, but without end: they have to outlast the run.
        drafts = [Draft(os.urandom(16).hex(), "echo", 1, 52, _BODY, client="nobody") for _ in range(part)]
        streams.enqueue([Group(Priority.BATCH, [draft]) for draft in drafts])
        count -= part


def memory(stage: Stage) -> int:
    return int(cast(Mapping[str, int], stage.connection.client.info("memory"))["used_memory"])


def settle_down(stage: Stage) -> None:
    """Until no rewrite of the append-only file is under way: it takes CPU and buffers."""
    client = stage.connection.client
    until(lambda: not cast(Mapping[str, int], client.info("persistence"))["aof_rewrite_in_progress"])


def served(streams: Streams, jobs: int) -> Mapping[str, float]:
    """Claim and settle `jobs`, MAX_JOBS_PER_CALL at a time: us a job, waiting for the server included."""
    claiming = settling = 0.0
    limit = ClaimBudget(jobs=MAX_JOBS_PER_CALL, rows=MAX_JOBS_PER_CALL, tokens=10**9)
    for _ in range(-(-jobs // MAX_JOBS_PER_CALL)):
        began = time.perf_counter()
        claims = streams.claim("worker", limit).claims
        claimed = time.perf_counter()
        streams.settle([Settlement(claim.address, _ANSWER) for claim in claims])
        settling += time.perf_counter() - claimed
        claiming += claimed - began
        fill(streams, len(claims))
    done = -(-jobs // MAX_JOBS_PER_CALL) * MAX_JOBS_PER_CALL
    return {"claim": 1e6 * claiming / done, "settle": 1e6 * settling / done, "both": 1e6 * (claiming + settling) / done}


def report(rounds: Rounds, sizes: Sequence[int]) -> Report:
    first, last = sizes[0], sizes[-1]
    growth = {size: rounds[f"{size} both"].over(rounds[f"{first} both"]) for size in sizes}
    rows: Grid = [
        [size, *rounds.of(f"{size}", ("claim", "settle", "both")), growth[size], rounds[f"{size} bytes"].median]
        for size in sizes
    ]
    heading = ["jobs waiting", "claim us", "settle us", "both us", f"/ {first:,}", "bytes a job beside its body"]
    table = Table("A long queue", heading, rows, f"A job of {len(_BODY)} bytes; {MAX_JOBS_PER_CALL} jobs a call.")
    targets = [
        Target(f"time a job with {last:,} waiting / with {first:,}", growth[last], "<=", 1.2),
        Target(f"memory a job with {last:,} waiting, beside its body, bytes", rounds[f"{last} bytes"], "<=", 450.0),
    ]
    points = [(float(size), rounds[f"{size} both"].median) for size in sizes]
    chart = Chart(
        "backlog", "Claim and settle, by jobs waiting", "jobs waiting", "us a job", {"us a job": points}, log="x"
    )
    return Report([table], targets, [chart])
