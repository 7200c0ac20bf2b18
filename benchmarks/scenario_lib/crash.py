"""One of 64 batch jobs ends the process that takes it, beside realtime calls: they stay quick, it alone is buried.

Two workers of a custom service. The process ends in the function itself, or in `cost` or `check`, which run while a job
is prepared.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from measure import Grid, Report, Table, percentile
from stage import Stage

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.queue.pause import pause, resume
from millstream.client import AsyncClient, Client
from millstream.client.handle import Handle
from scenario_lib.calls import ANSWERED, HEADING, Ended, at_least, at_most, counted, name_of, row, timed_async

FOLDER = Path(__file__).parent / "mill"
SERVICE = ServiceSpec(
    name="crash",
    model=ModelSpec(type="custom", handler="mortal:Mill"),
    model_ref="mortal",
    runtime=Runtime.model_validate({"batch_size": 64, "max_attempts": 3, "total_timeout": 300.0}),
)
WORKERS, JOBS, POISON = 2, 64, 31
PACE_S = 1 / 8
"""Seconds from one realtime call to the next, whether or not it was answered."""

WARM_S, ALONE_S = 2.0, 6.0
REALTIME_P99_S = 1.0
MOST_S = 60.0
"""Longest wait for the answers to all jobs."""

Where = Literal["function", "cost", "check"]


@dataclass(frozen=True, slots=True)
class Found:
    """`outcomes` are those of the jobs, in their order: ANSWERED, a wrong value, or the name of an error."""

    alone: Sequence[Ended]
    beside: Sequence[Ended]
    outcomes: Sequence[str]
    took_s: float
    deaths: int
    buried: int


def in_function(stage: Stage, seconds: float) -> Report:
    return _report("function", asyncio.run(_run(stage, "function", seconds)))


def in_cost(stage: Stage, seconds: float) -> Report:
    return _report("cost", asyncio.run(_run(stage, "cost", seconds)))


def in_check(stage: Stage, seconds: float) -> Report:
    return _report("check", asyncio.run(_run(stage, "check", seconds)))


async def _run(stage: Stage, where: Where, seconds: float) -> Found:
    await asyncio.to_thread(stage.workers, SERVICE, WORKERS, FOLDER)
    async with AsyncClient(stage.url) as realtime:
        await _paced(realtime, _for(WARM_S))
        alone = await _paced(realtime, _for(ALONE_S))
        with Client(stage.url) as client:
            began = time.monotonic()
            handles = await asyncio.to_thread(_send, stage, client, where)

            def goes_on() -> bool:
                age, left = time.monotonic() - began, not all(handle.ready for handle in handles)
                return age < seconds or (left and age < MOST_S)

            answered = asyncio.create_task(_all_ready(handles, began + MOST_S))
            beside = await _paced(realtime, goes_on)
            took_s = await answered - began
            outcomes = [_outcome(number, handle) for number, handle in enumerate(handles)]
    deaths = stage.log.count(" was killed by ") + stage.log.count(" exited with status ")
    return Found(alone, beside, outcomes, took_s, deaths, stage.connection.client.xlen(stage.keys(SERVICE).dead()))


def _send(stage: Stage, client: Client, where: Where) -> list[Handle]:
    """All jobs at once: whoever claims first finds a full batch."""
    pause(stage.connection.client, stage.keys(SERVICE))
    payloads: list[dict[str, Json]] = [{"n": number} for number in range(JOBS)]
    payloads[POISON]["die"] = where
    handles = [client.submit(SERVICE.name, [payload], priority="batch") for payload in payloads]
    resume(stage.connection.client, stage.keys(SERVICE))
    return handles


async def _all_ready(handles: Sequence[Handle], ends: float) -> float:
    """When the last one was answered, monotonic seconds; infinity if that was not before `ends`."""
    while not all(handle.ready for handle in handles):
        if time.monotonic() > ends:
            return float("inf")
        await asyncio.sleep(0.02)
    return time.monotonic()


async def _paced(client: AsyncClient, goes_on: Callable[[], bool]) -> list[Ended]:
    """Realtime calls at even times while `goes_on`; each latency counts from when its call was due."""
    calls: list[Awaitable[Ended]] = []
    due = time.perf_counter()
    while goes_on():
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        call = timed_async(lambda: client.call(SERVICE.name, {"n": 1}, priority="realtime", timeout=MOST_S), due)
        calls.append(asyncio.create_task(call))
        due += PACE_S
    return list(await asyncio.gather(*calls))


def _for(seconds: float) -> Callable[[], bool]:
    ends = time.monotonic() + seconds
    return lambda: time.monotonic() < ends


def _outcome(number: int, handle: Handle) -> str:
    if not handle.ready:
        return "no answer"
    try:
        (value,) = handle.result(0)
    except MillstreamError as error:
        return name_of(error)
    return ANSWERED if value == 2 * number else f"wrong value {value!r}"


def _report(where: Where, found: Found) -> Report:
    innocents = [outcome for number, outcome in enumerate(found.outcomes) if number != POISON]
    poison = found.outcomes[POISON]
    rows = [row("realtime alone", found.alone), row("realtime beside the crash", found.beside)]
    facts: Grid = [
        ["innocent batch jobs", counted(innocents)],
        ["the poison", poison],
        ["until all were answered, s", found.took_s],
        ["deaths of workers", found.deaths],
        ["dead letters", found.buried],
    ]
    tables = [
        Table(f"{JOBS} batch jobs, one ends its process in {where}", HEADING, rows, f"{WORKERS} workers."),
        Table("Batch", ["what", "measured"], facts),
    ]
    seconds = [each.seconds for each in found.beside]
    targets = [
        at_most("realtime beside the crash: p99, s", percentile(seconds, 0.99), REALTIME_P99_S),
        at_least("realtime beside the crash: all answered", _answered(found.beside), len(found.beside)),
        at_least("innocent batch jobs answered", innocents.count(ANSWERED), JOBS - 1),
        at_least("the poison ended in WorkerLost", poison == "WorkerLost", 1),
        at_most("dead letters, at most", found.buried, 1),
        at_least("dead letters, at least", found.buried, 1),
    ]
    return Report(tables, targets)


def _answered(ended: Sequence[Ended]) -> int:
    return sum(each.how == ANSWERED for each in ended)
