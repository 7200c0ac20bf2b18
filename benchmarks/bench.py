"""Measures millstream beside references taken in the same run, and prints tables: bench.py queue embed --json FILE.

Suites: queue, embed, dtypes, threads, scale, backlog, open-loop, idle, link, generation, generation-smollm2; all if
none is named. Medians of several rounds, in which product and reference take turns; in brackets the smallest and the
largest value.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import pages
from measure import Effort, Report, machine, verdicts
from stage import staged

SUITES = (
    "queue",
    "embed",
    "dtypes",
    "threads",
    "scale",
    "backlog",
    "open-loop",
    "idle",
    "link",
    "generation",
    "generation-smollm2",
)
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
QUICK_S = 0.2


def run(suite: str, effort: Effort) -> tuple[Report, str]:
    """One suite on a server of its own; what it found, and that server's version."""
    module = importlib.import_module(f"bench_{suite.replace('-', '_')}")
    with staged() as stage:
        report: Report = module.measure(stage, effort)
        return report, stage.version


def to_json(head: Mapping[str, str], reports: Mapping[str, Report]) -> str:
    suites = {
        name: {
            "tables": [table.to_json() for table in report.tables],
            "targets": [
                asdict(each) | {"measured": each.measured.to_json(), "met": each.met} for each in report.targets
            ],
        }
        for name, report in reports.items()
    }
    return json.dumps({"run": dict(head), "suites": suites}, indent=2)


def chosen(named: Sequence[str]) -> list[str]:
    return [suite for suite in SUITES if not named or "all" in named or suite in named]


@click.command(help=__doc__)
@click.argument("suites", nargs=-1, type=click.Choice([*SUITES, "all"]))
@click.option("--quick", is_flag=True, help="Small sizes and short runs: to see that it works, not how fast.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of each measurement.")
@click.option("--seconds", type=click.FloatRange(min=0.05), help=f"Length of one run; 1, with --quick {QUICK_S}.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all of it there, too."
)
@click.option("--contexts", type=click.Choice(["short", "384"]), multiple=True, help="Suites generation: prompts.")
@click.option("--threads", type=int, multiple=True, help="Suites generation: threads of a forward.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), multiple=True, help="Suites generation: of weights."
)
@click.option("--place", type=click.Choice(["alone", "busy"]), multiple=True, help="Suites generation: beside what.")
@click.option("--openvino", help="Suites generation: a Python that has OpenVINO GenAI, as one more reference.")
@click.option("--write-docs", is_flag=True, help=f"Renew the parts of {PAGE.name} that these suites measured.")
def main(
    suites: tuple[str, ...],
    quick: bool,
    repeats: int,
    seconds: float | None,
    json_file: Path | None,
    write_docs: bool,
    **options: str | Sequence[object] | None,
) -> None:
    if write_docs and quick:
        raise click.UsageError("--write-docs is for what was measured at length, without --quick.")
    # Else the server and the workers would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = {
        name: value if isinstance(value, str) else ",".join(map(str, value)) for name, value in options.items() if value
    }
    effort = Effort(repeats, seconds or (QUICK_S if quick else 1.0), quick, given)
    reports: dict[str, Report] = {}
    effort_line = f"{repeats} rounds of {effort.seconds:g} s{', quick' if quick else ''}"
    head: dict[str, str] = {}
    for suite in chosen(suites):
        began = time.monotonic()
        head = dict(machine())
        reports[suite], head["server"] = run(suite, effort)
        head["effort"] = effort_line
        if write_docs:
            # At once: a run that is cut short has renewed what it measured.
            pages.write(PAGE, head, suite, reports[suite])
        click.echo("\n\n".join(table.text() for table in reports[suite].tables))
        click.echo(f"\n[{suite}: {time.monotonic() - began:.0f} s]\n")
    targets = [each for report in reports.values() for each in report.targets]
    click.echo(verdicts(targets).text() + "\n")
    click.echo("\n".join(f"{name}: {value}" for name, value in head.items()))
    if json_file:
        json_file.write_text(to_json(head, reports), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
