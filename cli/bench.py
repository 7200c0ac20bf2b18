"""`millstream bench`: measures how fast a running service answers calls of the ordinary client."""

from __future__ import annotations

import asyncio
import json
import random
import string
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import click

from millstream.broker.config.spec import PriorityName, ServiceSpec
from millstream.broker.contract.errors import MillstreamError, NoWorkers
from millstream.broker.contract.job import Json
from millstream.broker.queue.registry import Registry
from millstream.broker.target import Target
from millstream.cli import options
from millstream.cli.options import SecondsRange
from millstream.cli.server import connect, find_server
from millstream.cli.table import align, number
from millstream.client import AsyncClient
from millstream.client.services import Services, operation_of

LONGEST_S = 600.0
MOST_ROWS, MOST_CONCURRENT, LONGEST_TEXT = 4_096, 1_024, 100_000
TEXTS = 512
"""Number of different texts."""

_PAUSE_S = 0.1
"""Pause after an error that gives no `retry_after`, seconds."""


@dataclass(frozen=True, slots=True)
class Load:
    """The calls to make: `concurrency` callers, each of which makes one call of `rows` texts after another.

    They start calls for `seconds`; each call has `timeout` seconds. `options` go to the model with each call.
    """

    service: str
    rows: int
    concurrency: int
    seconds: float
    priority: PriorityName
    timeout: float
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """The latency of each answered call in seconds, the number of errors by code, and the seconds of the whole run."""

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def figures(self, rows: int) -> dict[str, float | None]:
        """Returns rows and calls a second, and the latency of a call in ms. Counts answered calls only.

        The latencies are None if no call was answered.
        """
        answered = len(self.latencies)
        return {
            "rows_per_s": rows * answered / self.seconds,
            "calls_per_s": answered / self.seconds,
            "p50_ms": percentile_ms(self.latencies, 0.5),
            "p99_ms": percentile_ms(self.latencies, 0.99),
        }


def percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """Returns the value that a `share` (0 to 1) of `seconds` does not exceed, in ms; None if `seconds` is empty."""
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@click.command()
@options.service
@click.option("--rows", type=click.IntRange(1, MOST_ROWS), default=1, show_default=True, help="Texts in each call.")
@click.option(
    "--concurrency", type=click.IntRange(1, MOST_CONCURRENT), default=16, show_default=True, help="Calls at once."
)
@click.option(
    "--seconds",
    type=SecondsRange(0, LONGEST_S, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds in which calls are started.",
)
@click.option(
    "--length",
    type=click.IntRange(1, LONGEST_TEXT),
    default=200,
    show_default=True,
    help="Characters of each text, which has words of random letters.",
)
@click.option(
    "--timeout",
    type=SecondsRange(0, LONGEST_S, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for one call.",
)
@click.option(
    "--priority",
    type=click.Choice(["realtime", "normal", "batch"]),
    default="batch",
    show_default=True,
    help="Priority of the calls; jobs of other priorities go before batch.",
)
@options.json_output()
@options.url
@options.prefix
def bench(
    service: str,
    rows: int,
    concurrency: int,
    seconds: float,
    length: int,
    timeout: float,
    priority: PriorityName,
    as_json: bool,
    url: str | None,
    prefix: str | None,
) -> None:
    """Measure a running SERVICE with real calls: rows a second, p50 and p99 of a call, errors by code.

    The calls compete with all other calls for the same workers. At the default priority batch they get the capacity
    that other calls do not use, and at least the share of batch. The queue holds at most --concurrency of them. A call
    that is refused is counted, and another one follows after a pause. Ctrl-C ends the run and cancels the open calls.
    """
    target = find_server(url, prefix)
    spec = _find_spec(target, service)
    load = Load(service, rows, concurrency, seconds, priority, timeout, spec.model.operation.example)
    tally = asyncio.run(measure(target, load, list(words(length, random.Random()))))
    figures = tally.figures(rows)
    if as_json:
        setting = {"service": service, "rows": rows, "concurrency": concurrency, "length": length, "priority": priority}
        counts = {"calls": len(tally.latencies), "seconds": tally.seconds, "errors": dict(tally.errors)}
        click.echo(json.dumps({**setting, **counts, **figures}, indent=2))
    else:
        click.echo(align([_HEADING, _row(load, tally, figures)]))
    if not tally.latencies:
        click.get_current_context().exit(MillstreamError.exit_code)


_HEADING = ("SERVICE", "ROWS/CALL", "AT ONCE", "CALLS", "ROWS/S", "CALLS/S", "P50 MS", "P99 MS", "ERRORS")


def _row(load: Load, tally: Tally, figures: dict[str, float | None]) -> tuple[str, ...]:
    errors = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common())
    counts = (load.service, str(load.rows), str(load.concurrency), str(len(tally.latencies)))
    return (*counts, *(number(value, 1) for value in figures.values()), errors or "-")


def words(length: int, chance: random.Random) -> Iterator[str]:
    """Yields TEXTS texts of `length` ASCII characters, with words as long as English ones."""
    letters = string.ascii_lowercase + " " * 5
    for _ in range(TEXTS):
        yield "".join(chance.choices(letters, k=length)).strip().ljust(length, "x")


async def measure(target: Target, load: Load, texts: Sequence[str]) -> Tally:
    """Starts calls for `load.seconds`, waits for the open ones, and returns the figures of all."""
    # Each text is unique, also across runs, because the service may have a cache.
    tally = Tally()
    source = (f"{number} {text}"[: len(text)] for number, text in enumerate(cycle(texts)))
    async with AsyncClient(target.url, prefix=target.prefix) as client:
        began = time.perf_counter()
        until = began + load.seconds
        await asyncio.gather(*(_caller(client, load, source, until, tally) for _ in range(load.concurrency)))
        tally.seconds = time.perf_counter() - began
    return tally


async def _caller(client: AsyncClient, load: Load, texts: Iterator[Json], until: float, tally: Tally) -> None:
    while (began := time.perf_counter()) < until:
        inputs = list(islice(texts, load.rows))
        try:
            handle = await client.submit(
                load.service, inputs, priority=load.priority, timeout=load.timeout, wait=False, **load.options
            )
            await handle
        except MillstreamError as error:
            tally.errors[error.code] += 1
            await asyncio.sleep(min(until - began, error.retry_after or _PAUSE_S))
        else:
            tally.latencies.append(time.perf_counter() - began)


def _find_spec(target: Target, service: str) -> ServiceSpec:
    """Returns the registered spec of `service`.

    Raises UnknownService if it is not registered, InvalidRequest if it cannot be called, NoWorkers if none is alive.
    """
    with connect(target.url) as connection:
        services = Services(connection, Registry(connection, target.prefix))
        spec = services.read(service)
        operation_of(spec)
        live_workers = services.live_workers(service)
    if not live_workers:
        raise NoWorkers(
            f"no worker of service {service!r} is alive",
            hint="start one with `millstream up` or `millstream worker run`",
        )
    return spec
