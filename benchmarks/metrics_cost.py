"""Measures what counting costs: the product beside a copy of itself that counts nothing, in pairs of short runs.

Both are copies of the working tree, run by this interpreter; from one of them the code that counts is taken out. Each
answers calls of one text with an echo model, for as many threads as are in flight. The measure is the CPU time of a
call, which other load on the machine changes less than its rate. A ratio is with / without: 1.02 is a cost of 2 %. OK
means that its median is at most that by its upper 95 % bound, TOO MUCH that it is more by the lower one. Exit status 1
if a row is not OK.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from shutil import copy2
from typing import NamedTuple

import click
from checkouts import LENGTH, Checkout, Mill, working
from corpus import batches
from driver import Order
from measure import Cell, Rounds, Table, cpu_s, interval_of_median, machine
from paired import SIDES, Side, compare, order_of

ROOT = Path(__file__).resolve().parents[1]
MOST = 1.02

_SETTLER, _RUNNER = "worker/intake/settler.py", "worker/engines/runner.py"

CUTS: Sequence[tuple[str, str, str]] = (
    *((f"broker/queue/lua/{script}.lua", "if n > 0 and", "if false and") for script in ("enqueue", "settle")),
    (_SETTLER, "self._count(answered)", "self._counters.jobs += len(answered)"),
    (_SETTLER, "if answer.error is None and not answer.errors:", "if True:"),
    (_RUNNER, "self._histograms.add_forward(rows, step.tokens, step.computed)", "pass"),
    (_RUNNER, "self._histograms.add_output(job, now, now_s)", "pass"),
    ("worker/scheduling/packages.py", "dict(self._read())", "dict[str, int]()"),
)
"""File, the text in it that counts, which it has once, and what stands there in the copy that counts nothing."""

IN_FLIGHT = (256, 64, 1)

PARTS = ("all processes", "server and worker", "server", "worker")
"""Whose CPU time: `all processes` are the server, the worker, their supervisor and the client, which counts nothing."""

HEADING = ("in flight", "CPU of", "without, us", "with, us", "with / without", "95 % of the median", "verdict")


def copied(folder: Path, cuts: Sequence[tuple[str, str, str]] = ()) -> Checkout:
    """Copies the working tree to `folder`, with commands of its own, and makes `cuts` there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy2(ROOT / name, folder / name, follow_symlinks=False)
    for name, found, instead in cuts:
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(found, instead), encoding="utf-8")
    _write_commands(folder)
    return Checkout(folder)


def _write_commands(folder: Path) -> None:
    """Writes `python` and `millstream`, which import the code in `folder`."""
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    python = f'exec env PYTHONPATH="{folder / ".typecheck"}" "{sys.executable}"'
    for name, words in {"python": "", "millstream": "-m millstream.cli.main "}.items():
        (commands / name).write_text(f'#!/bin/sh\n{python} {words}"$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)


class Spent(NamedTuple):
    """One run: its calls, and the CPU seconds of each part."""

    calls: int
    cpu_s: Mapping[str, float]


def spent(mill: Mill, order: Order) -> Spent:
    """Runs `order`."""
    pids = {"worker": mill.workers, "server": mill.servers}
    pids["server and worker"] = [*pids["worker"], *pids["server"]]
    pids["all processes"] = [mill.up.pid, *pids["server and worker"]]
    before = {part: cpu_s(each) for part, each in pids.items()}
    result = mill.driver.run(order)
    used = {part: cpu_s(each) - before[part] for part, each in pids.items()}
    used["all processes"] += result.cpu_s
    return Spent(result.calls, used)


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU microseconds a call, in pairs of runs. A pair runs each side twice, in the order there and back."""

    checkouts: Mapping[Side, Checkout]
    seconds: float
    in_flight: Sequence[int]
    rounds: Rounds = field(default_factory=Rounds)

    def pairs(self, numbers: Sequence[int]) -> None:
        """Runs these pairs with the same processes.

        A process is a few percent slower or faster all of its life, so several pairs say little more than one.
        """
        with ExitStack() as ends:
            mills = {side: ends.enter_context(working(self.checkouts[side], "echo")) for side in order_of(numbers[0])}
            for in_flight in self.in_flight:
                order = Order("threads", in_flight, self.seconds, LENGTH)
                for mill in mills.values():
                    mill.driver.run(order)
                for number in numbers:
                    self._pair(mills, order, order_of(number))

    def _pair(self, mills: Mapping[Side, Mill], order: Order, sides: Sequence[Side]) -> None:
        runs: dict[Side, list[Spent]] = {side: [] for side in sides}
        for side in (*sides, *reversed(sides)):
            runs[side].append(spent(mills[side], order))
        for (side, found), part in product(runs.items(), PARTS):
            us = 1e6 * sum(run.cpu_s[part] for run in found) / sum(run.calls for run in found)
            self.rounds.add(f"{order.in_flight} {part} {side}", us)

    def table(self) -> Table:
        rows = [self._row(in_flight, part) for in_flight, part in product(self.in_flight, PARTS)]
        pairs = len(next(iter(self.rounds.values.values())))
        return Table("CPU time of one call, with and without counting", HEADING, rows, f"Medians of {pairs} pairs.")

    def _row(self, in_flight: int, part: str) -> list[Cell]:
        without, counting = (self.rounds[f"{in_flight} {part} {side}"] for side in SIDES)
        ratio = counting.over(without)
        low, high = interval_of_median(ratio.values)
        figures = [f"{ratio.median:.3f}", f"{low:.3f}-{high:.3f}", verdict(low, high)]
        return [in_flight, part, f"{without.median:.1f}", f"{counting.median:.1f}", *figures]


def verdict(low: float, high: float) -> str:
    """Returns what the bounds of a ratio of costs prove."""
    return "OK" if high <= MOST else "TOO MUCH" if low > MOST else "UNDECIDED"


@click.command(help=__doc__)
@click.option("--pairs", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.2), default=0.3, show_default=True, help="Of one run.")
@click.option("--in-flight", type=click.IntRange(min=1), multiple=True, default=IN_FLIGHT, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all values there.")
def main(pairs: int, seconds: float, in_flight: Sequence[int], json_file: Path | None) -> None:
    # Otherwise servers and workers would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    click.echo("\n".join(f"{name}: {value}" for name, value in machine().items()) + "\n")
    with tempfile.TemporaryDirectory(prefix="metrics-cost-") as home:
        checkouts: Mapping[Side, Checkout] = {
            "old": copied(Path(home) / "without", CUTS),
            "new": copied(Path(home) / "with"),
        }
        costs = Costs(checkouts, seconds, in_flight)
        compare(costs.pairs, batches(range(pairs), 1))
    found = costs.table()
    click.echo(found.text())
    if json_file:
        json_file.write_text(json.dumps(costs.rounds.values), encoding="utf-8")
    sys.exit(0 if all(row[-1] == "OK" for row in found.rows) else 1)


if __name__ == "__main__":
    main()
