"""Streams of text while workers are killed and connections are cut: each is complete, in order, with nothing twice.

An engine says 200 texts of 400 words at once, a word a step. Whenever both workers are ready, one gets SIGKILL. Once a
second the server cuts every connection. Marks in the records show at which word each worker began: at exactly as many
as were emitted before.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import redis
from measure import Cell, Report, Table, percentile
from stage import Stage, Team

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.partial import decode_records
from millstream.broker.queue.streams import Streams
from millstream.client import AsyncClient
from millstream.worker.models.echo_stream import BEGAN
from scenario_lib.calls import at_least, at_most

SERVICE = ServiceSpec(
    name="stream",
    model=ModelSpec(type="echo-stream", model_name="sleep:0.005"),
    model_ref="words",
    runtime=Runtime.of("echo-stream", batch_size=128, worker_count=2),
)
STREAMS, WORDS = 200, 400
CUT_EVERY_S, LOOK_S, MARKS_EVERY_S = 1.0, 0.05, 0.25
REST_S = 60.0
"""Seconds that streams which run when the kills end may take to end."""


@dataclass
class Found:
    """How streams ended, and what disturbed them. `marks`: words at which workers began, by job, as the server has."""

    ended: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    marks: dict[str, Sequence[int]] = field(default_factory=dict)
    kills: int = 0
    cuts: int = 0


def run(stage: Stage, seconds: float) -> Report:
    return _report(stage, asyncio.run(_run(stage, seconds)))


async def _run(stage: Stage, seconds: float) -> Found:
    found, team = Found(), await asyncio.to_thread(stage.workers, SERVICE, 2)
    ends = time.monotonic() + seconds
    async with AsyncClient(stage.url) as client, asyncio.timeout(seconds + REST_S):
        disturbing = [
            asyncio.create_task(disturb)
            for disturb in (_kill(stage, team, found), _cut(stage, found), _watch(stage, found))
        ]
        await asyncio.gather(*[_stream(client, number, ends, found) for number in range(STREAMS)])
        for task in disturbing:
            # One that failed disturbed nothing.
            if task.done():
                task.result()
            task.cancel()
    return found


async def _stream(client: AsyncClient, number: int, ends: float, found: Found) -> None:
    """One stream after another until the time is over."""
    chance = random.Random(number)
    while time.monotonic() < ends:
        text = " ".join(f"{chance.randrange(10**6):06}" for _ in range(WORDS))
        began, pieces = time.perf_counter(), list[str]()
        try:
            async with client.stream(SERVICE.name, text) as stream:
                async for piece in stream:
                    if not pieces:
                        found.first_s.append(time.perf_counter() - began)
                    pieces.append(piece)
            how = "complete" if "".join(pieces) == stream.text == text else "wrong text"
            if stream.finish_reason != "stop":
                how = f"finish reason {stream.finish_reason}"
        except MillstreamError as error:
            how = type(error).__name__
        found.ended[how] += 1


async def _kill(stage: Stage, team: Team, found: Found) -> None:
    chance, live = random.Random(1), list[int]()
    while True:
        await asyncio.sleep(LOOK_S)
        # Its own connection may be one that was cut.
        with suppress(redis.exceptions.ConnectionError, MillstreamError):
            live = [view.pid for view in await asyncio.to_thread(stage.live, SERVICE) if view.state == "ready"]
        if len(alive := [pid for pid in team.workers if pid in live]) == 2:
            os.kill(chance.choice(alive), signal.SIGKILL)
            found.kills += 1


async def _cut(stage: Stage, found: Found) -> None:
    while True:
        await asyncio.sleep(CUT_EVERY_S)
        with suppress(redis.exceptions.ConnectionError):
            found.cuts += int(stage.connection.client.client_kill_filter(_type="normal", skipme=True))


async def _watch(stage: Stage, found: Found) -> None:
    """Note at which words workers began, by what lies on the server."""
    while True:
        await asyncio.sleep(MARKS_EVERY_S)
        with suppress(redis.exceptions.ConnectionError, MillstreamError):
            for job_id, records in await asyncio.to_thread(lambda: list(_partials(stage))):
                found.marks[job_id] = [at for at, state in enumerate(records) if state == BEGAN]


def _partials(stage: Stage) -> Iterator[tuple[str, Sequence[bytes]]]:
    keys = stage.keys(SERVICE)
    streams, prefix = Streams(stage.connection.client, keys), keys.partial("")
    names = [key.decode().removeprefix(prefix) for key in stage.connection.client.scan_iter(f"{prefix}*", count=1000)]
    if names:
        for name, blob in zip(names, streams.partials(names), strict=True):
            yield name, [record.state for record in decode_records(blob)]


def _report(stage: Stage, found: Found) -> Report:
    left = list(stage.connection.client.scan_iter(f"{stage.keys(SERVICE).partial('')}*"))
    resumed = [marks for marks in found.marks.values() if len(marks) > 1]
    rows: list[list[Cell]] = [[f"streams: {how}", count] for how, count in sorted(found.ended.items())]
    rows += [
        ["workers killed", found.kills],
        ["connections cut", found.cuts],
        ["streams that a second worker went on with", len(resumed)],
        ["most workers of one stream", max(map(len, found.marks.values()), default=0)],
        ["first piece, p50 s", percentile(found.first_s, 0.5)],
        ["first piece, p99 s", percentile(found.first_s, 0.99)],
        ["partial keys left", len(left)],
    ]
    targets = [
        at_least("streams complete", found.ended["complete"], 2 * STREAMS),
        at_most("streams that are not", found.ended.total() - found.ended["complete"], 0),
        at_least("workers killed", found.kills, 10),
        at_least("streams that a second worker went on with", len(resumed), 50),
        at_most("partial keys left", len(left), 0),
    ]
    return Report([Table(f"{STREAMS} streams of {WORDS} words under kills", ["what", "measured"], rows)], targets)
