"""`millstream bench`: how fast a running service answers, asked through the client as any program would."""

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
from typing import TYPE_CHECKING

import click

from millstream.broker.contract.errors import MillstreamError, NoWorkers
from millstream.cli import options
from millstream.cli.options import SecondsRange
from millstream.cli.table import aligned, number

if TYPE_CHECKING:
    from millstream.broker.config.spec import ServiceSpec
    from millstream.broker.contract.job import Json
    from millstream.broker.target import Target
    from millstream.client import AsyncClient
    from millstream.client.calls import PriorityName

LONGEST_S = 600.0
MOST_ROWS, MOST_CONCURRENT, LONGEST_TEXT = 4_096, 1_024, 100_000
TEXTS = 512
"""Texts there are before one comes again."""

QUERY = "which of these texts is about a mill on a stream?"
"""What a reranker is asked."""

_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` callers, each with calls of `rows` texts in turn, for `seconds`; a call has `timeout` seconds.

    `options` go to the model with each call.
    """

    service: str
    rows: int
    concurrency: int
    seconds: float
    priority: PriorityName
    timeout: float
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """Seconds of each answered call, errors by code, and how long all of it took."""

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def figures(self, rows: int) -> dict[str, float | None]:
        """Rows and calls a second of those that were answered; ms a call, None where none was."""
        answered = len(self.latencies)
        return {
            "rows_per_s": rows * answered / self.seconds,
            "calls_per_s": answered / self.seconds,
            "p50_ms": percentile_ms(self.latencies, 0.5),
            "p99_ms": percentile_ms(self.latencies, 0.99),
        }


def percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The value that `share` (0 to 1) of `seconds` do not exceed, in ms; None of none."""
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
    help="How long to call.",
)
@click.option(
    "--length",
    type=click.IntRange(1, LONGEST_TEXT),
    default=200,
    show_default=True,
    help="Characters of a text; words of random letters.",
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
    help="Batch lets all other callers go first.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
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

    The calls compete with everybody else's for the same workers: at the priority batch, unless you say otherwise, they
    take what others leave, and what the batch share is sure of. The queue holds at most --concurrency of them; what is
    refused is counted and tried again later. Ctrl-C ends it and cancels what is under way.
    """
    target = options.find(url, prefix)
    spec = _checked(target, service)
    extra = {"query": QUERY} if spec.model.type == "reranker" else {}
    load = Load(service, rows, concurrency, seconds, priority, timeout, extra)
    tally = asyncio.run(measure(target, load, list(words(length, random.Random()))))
    figures = tally.figures(rows)
    if as_json:
        asked = {"service": service, "rows": rows, "concurrency": concurrency, "length": length, "priority": priority}
        counts = {"calls": len(tally.latencies), "seconds": tally.seconds, "errors": dict(tally.errors)}
        click.echo(json.dumps({**asked, **counts, **figures}, indent=2))
    else:
        click.echo(aligned([_HEADING, _row(load, tally, figures)]))
    if not tally.latencies:
        click.get_current_context().exit(MillstreamError.exit_code)


_HEADING = ("SERVICE", "ROWS/CALL", "AT ONCE", "CALLS", "ROWS/S", "CALLS/S", "P50 MS", "P99 MS", "ERRORS")


def _row(load: Load, tally: Tally, figures: dict[str, float | None]) -> tuple[str, ...]:
    errors = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common())
    asked = (load.service, str(load.rows), str(load.concurrency), str(len(tally.latencies)))
    return (*asked, *(number(value, 1) for value in figures.values()), errors or "-")


def words(length: int, chance: random.Random) -> Iterator[str]:
    """TEXTS texts of `length` ASCII characters, of words as long as English ones."""
    letters = string.ascii_lowercase + " " * 5
    for _ in range(TEXTS):
        yield "".join(chance.choices(letters, k=length)).strip().ljust(length, "x")


async def measure(target: Target, load: Load, texts: Sequence[str]) -> Tally:
    """Call for `load.seconds`, and wait for what is under way then."""
    from millstream.client import AsyncClient

    # No text comes twice, nor in the next run: the service may have a cache.
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


def _checked(target: Target, service: str) -> ServiceSpec:
    """The service as it is registered. Raises UnknownService, InvalidRequest where it cannot be called, NoWorkers."""
    from millstream.broker.queue.registry import Registry
    from millstream.client.services import Services, op_of

    with options.connected(target.url) as connection:
        services = Services(connection, Registry(connection, target.prefix))
        spec = services.read(service)
        op_of(spec)
        live_workers = services.live_workers(service)
    if not live_workers:
        raise NoWorkers(
            f"no worker of service {service!r} is alive",
            hint="start one with `millstream up` or `millstream worker run`",
        )
    return spec
