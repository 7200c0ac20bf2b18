"""2,000 callers wait for a service that admits 10 calls a second: what their waiting costs, and in which order they go.

Each sends 2 kB. Requests are what the server read from its sockets (`total_reads_processed`): a request is one read, or
more when it is large.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from corpus import payloads
from measure import Cell, Report, Table, percentile
from stage import Stage, echo

from millstream.client import AsyncClient
from scenario_lib.calls import at_least, at_most

CALLERS, LENGTH, CALLS_A_SECOND = 2_000, 2_000, 10.0
SERVICE = echo("waiters", rate_limit=CALLS_A_SECOND, total_timeout=600.0)
FIGURES = {
    "requests/s": "total_reads_processed",
    "commands/s, also inside scripts": "total_commands_processed",
    "bytes in/s": "total_net_input_bytes",
}
APART_S = 0.001
"""Seconds between the begins of two calls: at one instant there is no order."""

SETTLE_S, IDLE_S = 5.0, 3.0
MOST_REQUESTS, MOST_BYTES = 100.0, 250_000.0
"""A second; the bytes are those of MOST_REQUESTS bodies, and something for what stands around them."""

MOST_OVERTAKEN = 20
"""Places by which a call may be admitted before or after its turn: answers of one batch come together."""

LEAST_ADMITTED = 0.8
STEPS = (1, 10, 50, 100, 200, 300)


@dataclass(slots=True)
class Admitted:
    """Calls in the order of their answers: the number of each by its begin, and its age in seconds."""

    numbers: list[int] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)

    @property
    def displaced(self) -> Sequence[int]:
        """Places between the order of begins and that of answers, for each call."""
        return [abs(number - place) for place, number in enumerate(self.numbers)]


def run(stage: Stage, seconds: float) -> Report:
    stage.workers(SERVICE, 1)
    idle = asyncio.run(_measured(stage, IDLE_S))
    admitted = Admitted()
    waiting = asyncio.run(_waiting(stage, seconds, admitted))
    return _report(idle, waiting, admitted, seconds)


async def _waiting(stage: Stage, seconds: float, admitted: Admitted) -> Mapping[str, float]:
    texts = payloads(CALLERS, LENGTH)
    async with AsyncClient(stage.url) as client:
        tasks = []
        for number, text in enumerate(texts):
            tasks.append(asyncio.create_task(_call(client, number, text, admitted)))
            await asyncio.sleep(APART_S)
        await asyncio.sleep(SETTLE_S)
        figures = await _measured(stage, seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return figures


async def _call(client: AsyncClient, number: int, text: str, admitted: Admitted) -> None:
    began = time.perf_counter()
    await (await client.submit(SERVICE.name, [text]))
    admitted.numbers.append(number)
    admitted.ages.append(time.perf_counter() - began)


async def _measured(stage: Stage, seconds: float) -> Mapping[str, float]:
    """What the server did, a second."""
    began, before = time.perf_counter(), stage.connection.client.info("stats")
    await asyncio.sleep(seconds)
    after, took = stage.connection.client.info("stats"), time.perf_counter() - began
    return {name: (after[field] - before[field]) / took for name, field in FIGURES.items()}


def _report(idle: Mapping[str, float], waiting: Mapping[str, float], admitted: Admitted, seconds: float) -> Report:
    cost: list[list[Cell]] = [[name, idle[name], waiting[name]] for name in FIGURES]
    ages: list[list[Cell]] = [
        [step, admitted.numbers[step - 1] + 1, admitted.ages[step - 1]]
        for step in STEPS
        if step <= len(admitted.numbers)
    ]
    displaced = admitted.displaced
    tables = [
        Table(f"{CALLERS:,} callers of {LENGTH} B wait", ["what", "nobody waits", "they wait"], cost),
        Table("Order of admission", ["admitted as number", "call number", "age s"], ages),
    ]
    targets = [
        at_most("requests a second", waiting["requests/s"], MOST_REQUESTS),
        at_most("bytes a second", waiting["bytes in/s"], MOST_BYTES),
        at_most("places out of turn, p50", percentile(displaced, 0.5), MOST_OVERTAKEN),
        at_most("places out of turn, longest", max(displaced, default=float("nan")), MOST_OVERTAKEN),
        at_least("calls admitted", len(admitted.numbers), LEAST_ADMITTED * CALLS_A_SECOND * seconds),
    ]
    return Report(tables, targets)
