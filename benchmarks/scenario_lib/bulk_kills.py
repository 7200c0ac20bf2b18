"""A bulk run whose process, workers and server are killed at random moments: nothing is lost, wrong or done twice.

The input has duplicates and bad rows. Before that the same run is made undisturbed, for its results.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import click
import numpy as np
from corpus import mix
from measure import Grid, Report, Table
from stage import Stage, Team, until

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, PartialFailure
from millstream.broker.contract.job import Json
from scenario_lib.bulk import LIMIT_S, Run, minilm, read_output, write_input
from scenario_lib.calls import at_least, at_most

KILLS = {"process": 20, "worker": 5, "server": 2}
FEW_KILLS = {"process": 2, "worker": 1, "server": 1}
"""Kills in a run of the full size, and of a smaller one."""

BAD = 20
TOLERANCE = 1e-5
"""Most difference of a number of a vector from that of the undisturbed run."""

LOOK_S, MOST_PAUSE_S = 0.1, 0.1
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT_TOKENS = 24
SHARD_ROWS = 512


@dataclass(frozen=True, slots=True)
class Case:
    """A run. `same` compares a result with that of the undisturbed run; `most_twice`: rows that may run twice."""

    spec: ServiceSpec
    inputs: Sequence[str]
    more: Sequence[str]
    same: Callable[[Json, Json], bool]
    most_twice: int
    rows_of_all_kills: int


@dataclass
class Tally:
    """Counters of the service's workers, also of those that died: the most that each has said."""

    rows: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    @contextmanager
    def watching(self, stage: Stage, spec: ServiceSpec) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_S):
                # The server may be dead now.
                with suppress(MillstreamError, OSError):
                    self.look(stage, spec)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def look(self, stage: Stage, spec: ServiceSpec) -> None:
        for worker in stage.live(spec):
            name = f"{worker.host} {worker.pid}"
            self.rows[name] = max(worker.rows, self.rows.get(name, 0))


def vectors(stage: Stage, rows: int) -> Report:
    texts = mix((rows + 1) // 2)
    inputs = [texts[row // 2] for row in range(rows)]
    # Not all rows are in flight at once: the run goes on only while its process does.
    shard = max(1, min(SHARD_ROWS, rows // 160))
    more = ["--shard-rows", str(shard), "--window", str(4 * shard)]
    return _run(stage, Case(minilm("kills"), inputs, more, _near, 4 * shard, 1_000))


def texts(stage: Stage, rows: int) -> Report:
    of = ModelSpec.model_validate({"type": "llm", "model_name": LANGUAGE_MODEL, "device": "cpu", "dtype": "float32"})
    runtime = {"batch_size": 16, "max_batch_tokens": 16_384, "worker_count": 1}
    spec = ServiceSpec(name="kills", model=of, model_ref="m", runtime=Runtime.model_validate(runtime))
    prompts = [" ".join(text.split()[:16]) for text in mix((rows + 1) // 2)]
    inputs = [prompts[row // 2] for row in range(rows)]
    options = {"max_tokens": TEXT_TOKENS, "temperature": 0, "ignore_eos": "true"}
    more = [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
    shard = max(1, rows // 40)
    return _run(
        stage,
        Case(spec, inputs, [*more, "--shard-rows", str(shard), "--window", str(4 * shard)], _equal, 4 * shard, 200),
    )


def _near(result: Json, undisturbed: Json) -> bool:
    return bool(np.abs(np.asarray(result) - np.asarray(undisturbed)).max() <= TOLERANCE)


def _equal(result: Json, undisturbed: Json) -> bool:
    return isinstance(result, dict) and isinstance(undisturbed, dict) and result["text"] == undisturbed["text"]


def _run(stage: Stage, case: Case) -> Report:
    rows, tally = len(case.inputs), Tally()
    source = stage.home / "in.jsonl"
    bad = write_input(source, case.inputs, min(BAD, rows // 10))
    team = stage.workers(case.spec, 1)
    undisturbed = Run(stage, case.spec.name, source, stage.home / "undisturbed", case.more)
    seconds = undisturbed.complete().seconds
    _await_counts(stage, case, tally, rows - len(bad))
    expected: dict[int, Json] = {}
    read_output(undisturbed.output, rows, bad, lambda row, result: expected.setdefault(row, result) is result)
    before = tally.total, _jobs(stage, case.spec)

    killed = Run(stage, case.spec.name, source, stage.home / "killed", case.more)
    kills = KILLS if rows >= case.rows_of_all_kills else FEW_KILLS
    with tally.watching(stage, case.spec):
        done = _kill(stage, team, case.spec, killed, kills, rows)
        time.sleep(1.5)
    verdict = read_output(killed.output, rows, bad, lambda row, result: case.same(result, expected.get(row)))
    good = rows - len(bad)
    twice = max(0, tally.total - before[0] - good)
    resent = _jobs(stage, case.spec) - before[1] - before[1]
    lines: Grid = [[f"kills: {what}", count] for what, count in done.items()]
    lines += [
        ["rows that the workers' counters say", tally.total - before[0]],
        ["rows with a result", good],
        ["rows done twice", twice],
        ["jobs sent again", resent],
    ]
    note = "A worker says once a second what it did, so up to a second of each one that was killed is not counted."
    table = Table(f"{rows:,} rows, {seconds:.0f} s undisturbed", ["what", "number"], lines, note)
    targets = [
        *verdict.targets("after the kills"),
        *(at_least(f"kills: {what}", done[what], count) for what, count in kills.items()),
        at_most("rows done twice", twice, case.most_twice),
        at_most("jobs sent again", resent, 0),
    ]
    return Report([table], targets)


def _kill(stage: Stage, team: Team, spec: ServiceSpec, run: Run, kills: dict[str, int], rows: int) -> dict[str, int]:
    """Kills at random moments of a run of `rows`, spread over its rows; it goes on each time. Then lets it end."""
    done, chance = dict.fromkeys(kills, 0), random.Random()
    events = [what for what, count in kills.items() for _ in range(count)]
    chance.shuffle(events)
    process = run.begin()
    try:
        for number, what in enumerate(events):
            process = _await_work(run, process)
            _await_rows(run, process, rows * number // (len(events) + 1))
            time.sleep(chance.uniform(0.0, MOST_PAUSE_S))
            if run.finished:
                break
            if what == "process":
                process.kill()
                process.wait()
                # What ran meanwhile is adopted.
                time.sleep(chance.uniform(0.0, 0.5))
                process = run.begin()
            elif what == "worker":
                until(lambda: stage.live(spec))
                _kill_worker(stage, team)
            else:
                os.kill(stage.server.pid, signal.SIGKILL)
                stage.server.restart()
            done[what] += 1
    finally:
        _stop(process)
    click.echo(f"killed: {done}; the run {'was finished' if run.finished else 'goes on'}")
    run.complete()
    return done


def _await_work(run: Run, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Returns the process once it works on the run: killed while it imports its modules, it would disturb nothing.

    If the server died before it had asked it for the service, it ended, and its caller tries again. Raises RuntimeError
    if it failed.
    """
    until(lambda: process.poll() is not None or run.works)
    if process.poll() == BrokerUnavailable.exit_code:
        return _await_work(run, run.begin())
    if process.poll() not in (None, 0, PartialFailure.exit_code):
        raise RuntimeError(f"the bulk process ended with {process.returncode}")
    return process


def _await_rows(run: Run, process: subprocess.Popen[bytes], rows: int) -> None:
    until(lambda: run.rows >= rows or process.poll() is not None, within_s=LIMIT_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _kill_worker(stage: Stage, team: Team) -> None:
    """Kills the worker once there is one, and waits for no other."""
    until(lambda: team.workers)
    with suppress(ProcessLookupError):
        os.kill(team.workers[0], signal.SIGKILL)


def _await_counts(stage: Stage, case: Case, tally: Tally, rows: int) -> None:
    def counted() -> bool:
        tally.look(stage, case.spec)
        return tally.total >= rows

    until(counted)


def _jobs(stage: Stage, spec: ServiceSpec) -> int:
    """Jobs that were ever sent."""
    infos = [stage.connection.client.xinfo_stream(stream) for stream in stage.keys(spec).streams()]
    return sum(int(info["entries-added"]) for info in infos)
