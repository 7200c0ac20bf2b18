"""Ctrl-C in a program that waits in `client.embed` for 2,000 rows: no row runs for nobody.

The program catches KeyboardInterrupt and lives on, as an interactive one does.
"""

from __future__ import annotations

import signal
import time

from measure import Cell, Report, Table
from stage import Stage, echo, until

from scenario_lib.calls import at_least, at_most

ROWS, BATCH, FORWARD_S = 2_000, 32, 0.25
SERVICE = echo("interrupt", f"vector:8,sleep:{FORWARD_S:g}", batch_size=BATCH)
BEFORE_ROWS = 5 * BATCH
BEAT_S = 1.0
MOST_AFTER = BATCH * (2 + round(BEAT_S / FORWARD_S))
"""Rows of the forwards until the worker's next beat, which says what was cancelled, and of the one under way then."""

QUIET_S = 3.0
"""Seconds without another row, after which no more is expected. Workers say once a second what they did."""


def run(stage: Stage, seconds: float) -> Report:
    stage.workers(SERVICE, 1)
    program = stage.python("scenario_lib/interrupted.py", stage.url, SERVICE.name, str(ROWS))
    if not program.stdin or not program.stdout or program.stdout.readline() != "calling\n":
        raise RuntimeError("the program did not call")
    until(lambda: _rows(stage) > BEFORE_ROWS)
    jobs = _ended_jobs(stage)
    began = time.perf_counter()
    program.send_signal(signal.SIGINT)
    said = program.stdout.readline().strip()
    took_s = time.perf_counter() - began
    before = _at_the_interrupt(stage, jobs)
    _await_quiet(stage, seconds)
    after = _rows(stage) - before
    rows: list[list[Cell]] = [
        ["rows of the call", ROWS],
        ["rows run before Ctrl-C", before],
        ["rows run afterwards", after],
        ["jobs left in the queue", _depth(stage)],
        ["until the program had its KeyboardInterrupt, s", took_s],
    ]
    note = f"Forwards of {FORWARD_S:g} s and {BATCH} rows. The count ends after {seconds:g} s."
    targets = [
        at_most("rows run afterwards", after, MOST_AFTER),
        at_most("jobs left in the queue", _depth(stage), 0),
        at_most("until KeyboardInterrupt, s", took_s, 1.0),
        at_least("the program was interrupted", said == "interrupted", 1),
    ]
    return Report([Table("Ctrl-C in embed", ["what", "measured"], rows, note)], targets)


def _at_the_interrupt(stage: Stage, jobs: int) -> int:
    """Rows in the jobs that had ended by then; the first job was of one row, all others are full."""
    return 1 + (jobs - 1) * BATCH


def _ended_jobs(stage: Stage) -> int:
    """Jobs that came and are gone from the streams."""
    infos = [stage.connection.client.xinfo_stream(stream) for stream in stage.keys(SERVICE).streams()]
    return sum(int(info["entries-added"]) - int(info["length"]) for info in infos)


def _await_quiet(stage: Stage, seconds: float) -> None:
    """Wait until no row has run for QUIET_S, at most `seconds`."""
    ends, rows, since = time.monotonic() + seconds, _rows(stage), time.monotonic()
    while time.monotonic() < min(ends, since + QUIET_S):
        time.sleep(0.1)
        if (now := _rows(stage)) != rows:
            rows, since = now, time.monotonic()


def _rows(stage: Stage) -> int:
    return sum(worker.rows for worker in stage.live(SERVICE))


def _depth(stage: Stage) -> int:
    return sum(stage.connection.client.xlen(stream) for stream in stage.keys(SERVICE).streams())
