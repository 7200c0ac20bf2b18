"""The server is stopped (SIGSTOP): calls with a timeout of 1 s end in time, and nobody else in the process waits.

Meanwhile 1,000 async calls begin at once and 1,000 one after another, 50 threads call again and again, and 10 clients
are made that have never reached the server. Then the server goes on, and so must everything else.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from measure import Grid, Report, Table, percentile
from stage import Stage, echo, until

from millstream.client import AsyncClient, Client
from scenario_lib.calls import ANSWERED, HEADING, Ended, at_least, at_most, longest, row, timed, timed_async, typed

SERVICE = echo("frozen")
CALLS, THREADS, NEW_CLIENTS, AFTERWARDS = 1_000, 50, 10, 200
TIMEOUT_S, END_S = 1.0, 1.5
OTHERS_S = 0.5
"""Longest an asyncio.to_thread of somebody else may take: creating 1,000 calls keeps the loop busy for a while."""

CALM_S = 3.0
"""Seconds until the calls one after another begin: those at once should have ended."""

LOOK_S = 0.02
WAIT_S = 60.0
"""Longest wait for calls that should have ended long ago."""


@dataclass(slots=True)
class Tally:
    """`others` are the seconds of each asyncio.to_thread beside the calls, `lag` those by which the loop was late."""

    at_once: Sequence[Ended] = ()
    staggered: Sequence[Ended] = ()
    threads: list[Ended] = field(default_factory=list)
    new: list[Ended] = field(default_factory=list)
    afterwards: list[Ended] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)


def run(stage: Stage, seconds: float) -> Report:
    stage.workers(SERVICE, 1)
    tally = Tally()
    with Client(stage.url) as client:
        client.submit(SERVICE.name, ["first"]).result()
        asyncio.run(_storm(stage, client, seconds, tally))
        until(lambda: not _depth(stage), within_s=WAIT_S)
    return _report(tally, seconds)


async def _storm(stage: Stage, client: Client, seconds: float, tally: Tally) -> None:
    async with AsyncClient(stage.url) as calls:
        await (await calls.submit(SERVICE.name, ["first"]))
        with _stopped(stage.server.pid, seconds):
            ends = time.monotonic() + seconds - 2 * TIMEOUT_S
            threads = [_thread(lambda: _call_on(client, ends, tally.threads)) for _ in range(THREADS)]
            threads += [_thread(lambda: tally.new.append(_new_client(stage.url))) for _ in range(NEW_CLIENTS)]
            watch = asyncio.create_task(_watch_others(tally))
            step = (seconds - CALM_S - 2 * TIMEOUT_S) / CALLS
            tally.at_once, tally.staggered = await asyncio.gather(
                _together(calls, [0.0] * CALLS),
                _together(calls, [CALM_S + number * step for number in range(CALLS)]),
            )
            await asyncio.to_thread(_join, threads)
            watch.cancel()
        tally.afterwards += await asyncio.gather(
            *(timed_async(lambda: _call(calls, 10.0)) for _ in range(AFTERWARDS)),
        )
    tally.afterwards += [timed(lambda: client.submit(SERVICE.name, ["text"], timeout=10.0).result())]


async def _together(client: AsyncClient, starts: Sequence[float]) -> Sequence[Ended]:
    """One call at each of `starts`, seconds from now."""

    async def one(start: float) -> Ended:
        await asyncio.sleep(start)
        return await timed_async(lambda: _call(client, TIMEOUT_S))

    return await asyncio.gather(*map(one, starts))


async def _call(client: AsyncClient, timeout: float) -> object:
    return await (await client.submit(SERVICE.name, ["text"], timeout=timeout))


def _call_on(client: Client, ends: float, tally: list[Ended]) -> None:
    while time.monotonic() < ends:
        tally.append(timed(lambda: client.submit(SERVICE.name, ["text"], timeout=TIMEOUT_S).result()))


def _new_client(url: str) -> Ended:
    client = Client(url)
    ended = timed(lambda: client.submit(SERVICE.name, ["text"], timeout=TIMEOUT_S).result())
    client.close()
    return ended


async def _watch_others(tally: Tally) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LOOK_S)
        tally.lag.append(time.perf_counter() - began - LOOK_S)
        began = time.perf_counter()
        await asyncio.to_thread(int)
        tally.others.append(time.perf_counter() - began)


@contextmanager
def _stopped(pid: int, seconds: float) -> Iterator[None]:
    """Stop the process for `seconds`, however long the body takes."""
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
    timer.start()
    try:
        yield
        timer.join()
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)


def _thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def _join(threads: Sequence[threading.Thread]) -> None:
    until(lambda: not any(thread.is_alive() for thread in threads), within_s=WAIT_S)


def _depth(stage: Stage) -> int:
    return sum(stage.connection.client.xlen(stream) for stream in stage.keys(SERVICE).streams())


def _report(tally: Tally, seconds: float) -> Report:
    groups = {
        f"async, {CALLS:,} at once": tally.at_once,
        f"async, {CALLS:,} one after another": tally.staggered,
        f"{THREADS} threads": tally.threads,
        f"{NEW_CLIENTS} new clients": tally.new,
    }
    rows = [row(name, ended) for name, ended in {**groups, "afterwards": tally.afterwards}.items()]
    note = f"The server is stopped for {seconds:g} s; timeout={TIMEOUT_S:g}."
    others: Grid = [
        ["asyncio.to_thread of others", len(tally.others), percentile(tally.others, 0.5), max(tally.others)],
        ["lateness of the event loop", len(tally.lag), percentile(tally.lag, 0.5), max(tally.lag)],
    ]
    tables = [
        Table("Calls while the server is stopped", HEADING, rows, note),
        Table("Others in the same loop", ["what", "number", "p50 s", "max s"], others),
    ]
    targets = [target for name, ended in groups.items() for target in (longest(name, ended, END_S), typed(name, ended))]
    targets.append(at_most("asyncio.to_thread of others: longest, s", max(tally.others), OTHERS_S))
    answered = sum(each.how == ANSWERED for each in tally.afterwards)
    targets.append(at_least("answered afterwards", answered, len(tally.afterwards)))
    return Report(tables, targets)
