"""Forwards of 1 s under total_timeout 6 s: a list and a `map` far longer than that complete, since they make progress.

Beside them a list and a `map` whose only worker is stopped for ever (SIGSTOP, with its supervisor): both end in a typed
error.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from measure import Cell, Report, Table
from stage import Stage, Team, echo

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.queue.lease import LEASE_S
from millstream.client import Client
from scenario_lib.calls import ANSWERED, ENDLESS, UNTYPED, at_least, at_most, counted, name_of

FORWARD_S, FORWARD_ROWS, TOTAL_TIMEOUT_S = 1.0, 8, 6.0
RUNTIME = {"batch_size": FORWARD_ROWS, "total_timeout": TOTAL_TIMEOUT_S}
LIST, MAP, HELD = (echo(name, f"sleep:{FORWARD_S:g}", **RUNTIME) for name in ("list", "map", "held"))
SLACK, START_S = 1.3, 15.0
"""A call has its forwards' time so often, and START_S more, before it counts as endless."""

FREEZE_AFTER_S = 3.0
FROZEN_END_S = TOTAL_TIMEOUT_S + LEASE_S + 2.0
"""Seconds after the freeze in which calls must end: the last progress may be one forward old."""

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`rows` are ANSWERED or an error's name each; `ended_s` is when the call ended, seconds after its begin."""

    rows: Sequence[str]
    ended_s: float


def run(stage: Stage, seconds: float) -> Report:
    texts = [f"row {number}" for number in range(round(FORWARD_ROWS * seconds / FORWARD_S))]
    limit_s = SLACK * seconds + START_S
    for spec in (LIST, MAP):
        stage.workers(spec, 1)
    team = stage.workers(HELD, 1)
    with Client(stage.url) as client, ThreadPoolExecutor(4) as pool:
        run_in = pool.submit
        calls = {
            "a list": run_in(_listed, client, LIST.name, texts),
            "a map": run_in(_mapped, client, MAP.name, texts),
        }
        held = {
            "a list, its worker frozen": run_in(_listed, client, HELD.name, texts[:80]),
            "a map, its worker frozen": run_in(_mapped, client, HELD.name, texts[:80]),
        }
        time.sleep(FREEZE_AFTER_S)
        with _stopped(team):
            ended_held = _gathered(held, FREEZE_AFTER_S + WAIT_S)
        ended = _gathered(calls, limit_s)
        # Whatever is left of them ends now, so that the pool can.
        client.close()
    return _report(ended, ended_held, len(texts))


def _listed(client: Client, service: str, texts: Sequence[str]) -> Outcome:
    return _ended(lambda: client.submit(service, texts).outcomes())


def _mapped(client: Client, service: str, texts: Sequence[str]) -> Outcome:
    return _ended(lambda: list(client.map(service, texts, results="outcomes")))


def _ended(call: Callable[[], Sequence[object]]) -> Outcome:
    began = time.monotonic()
    try:
        rows = [name_of(each) if isinstance(each, Exception) else ANSWERED for each in call()]
    except MillstreamError as error:
        rows = [name_of(error)]
    except Exception as error:  # noqa: BLE001 - how a call ends is what is measured
        rows = [f"{UNTYPED} {type(error).__name__}"]
    return Outcome(rows, time.monotonic() - began)


def _gathered(calls: dict[str, Future[Outcome]], limit_s: float) -> dict[str, Outcome]:
    ends = time.monotonic() + limit_s
    return {name: _within(call, ends) for name, call in calls.items()}


def _within(call: Future[Outcome], ends: float) -> Outcome:
    try:
        return call.result(max(0.0, ends - time.monotonic()))
    except TimeoutError:
        return Outcome([ENDLESS], float("inf"))


@contextmanager
def _stopped(team: Team) -> Iterator[None]:
    """Stop the supervisor first: it would replace a worker that does not answer."""
    pids = team.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _report(ended: dict[str, Outcome], held: dict[str, Outcome], rows: int) -> Report:
    lines: list[list[Cell]] = [[name, counted(each.rows), each.ended_s] for name, each in {**ended, **held}.items()]
    note = (
        f"Forwards of {FORWARD_S:g} s and {FORWARD_ROWS} rows, total_timeout {TOTAL_TIMEOUT_S:g} s; {rows} rows each."
    )
    targets = [
        at_least(f"{name}: rows answered", list(each.rows).count(ANSWERED), rows) for name, each in ended.items()
    ]
    for name, each in held.items():
        failed = [how for how in each.rows if how != ANSWERED]
        strange = [how for how in failed if how.startswith((UNTYPED, ENDLESS))]
        targets.append(at_least(f"{name}: rows that failed", len(failed), 1))
        targets.append(at_most(f"{name}: of these without a typed error", len(strange), 0))
        targets.append(at_most(f"{name}: ended after the freeze, s", each.ended_s - FREEZE_AFTER_S, FROZEN_END_S))
    return Report([Table("Slow forwards", ["call", "rows", "ended after s"], lines, note)], targets)
