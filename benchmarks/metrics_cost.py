"""Measures what counting costs: the product beside a copy of itself that counts nothing, in pairs of short runs.

Both are copies of the working tree, run by this interpreter; from one of them the code that counts is taken out. The
measures and their order are those of paired.py, with an echo model. A ratio is with / without: 0.98 is a cost of 2 %. A
measure is OK if the upper 95 % bound of its median ratio is not below 0.98. Exit status 1 if one is not.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copy2

import click
from checkouts import Checkout
from corpus import batches
from measure import Cell, Table, interval_of_median, machine
from paired import MEASURES, Comparison, Side, compare

ROOT = Path(__file__).resolve().parents[1]
LEAST = 0.98

_SETTLER, _RUNNER = "worker/intake/settler.py", "worker/engines/runner.py"

CUTS: Sequence[tuple[str, str, str]] = (
    *((f"broker/queue/lua/{script}.lua", "if n > 0 and", "if false and") for script in ("enqueue", "settle")),
    (_SETTLER, "self._count(answered)", "self._counters.jobs += len(answered)"),
    (_SETTLER, "_failed(answer, finished.address.rows)", "NO_FAILURES"),
    (_RUNNER, "self._histograms.add_forward(rows, step.tokens, step.computed)", "pass"),
    (_RUNNER, "self._histograms.add_output(job, now, now_s)", "pass"),
    ("worker/scheduling/packages.py", "dict(self._read())", "dict[str, int]()"),
)
"""File, the text in it that counts, which it has once, and what stands there in the copy that counts nothing."""

HEADING = ("measure", "without", "with", "with / without", "95 % of the median", "upper bound", "verdict")


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


def table(comparison: Comparison, pairs: int) -> Table:
    rows = [_row(comparison, name) for name in MEASURES["echo"]]
    return Table("With / without counting", HEADING, rows, f"Medians of {pairs} pairs.")


def _row(comparison: Comparison, name: str) -> list[Cell]:
    without, counting = comparison.rounds[f"{name} old"], comparison.rounds[f"{name} new"]
    ratio = counting.over(without)
    low, high = interval_of_median(ratio.values)
    verdict = "OK" if high >= LEAST else "SLOWER"
    figures = [f"{ratio.median:.3f}", f"{low:.3f}-{high:.3f}", f"{high:.3f}", verdict]
    return [name, without.median, counting.median, *figures]


@click.command(help=__doc__)
@click.option("--pairs", type=click.IntRange(min=1), default=9, show_default=True)
@click.option(
    "--restart-every", type=click.IntRange(min=1), default=5, show_default=True, help="Pairs with the same processes."
)
@click.option("--seconds", type=click.FloatRange(min=0.2), default=1.0, show_default=True, help="Of one closed loop.")
def main(pairs: int, restart_every: int, seconds: float) -> None:
    # Otherwise servers and workers would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    click.echo("\n".join(f"{name}: {value}" for name, value in machine().items()) + "\n")
    with tempfile.TemporaryDirectory(prefix="metrics-cost-") as home:
        checkouts: Mapping[Side, Checkout] = {
            "old": copied(Path(home) / "without", CUTS),
            "new": copied(Path(home) / "with"),
        }
        comparison = Comparison(checkouts, seconds, ("echo",))
        found = table(comparison, compare(comparison, batches(range(pairs), restart_every)))
    click.echo(found.text())
    sys.exit(0 if all(row[-1] == "OK" for row in found.rows) else 1)


if __name__ == "__main__":
    main()
