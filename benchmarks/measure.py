"""What the benchmarks share: samples with their spread, tables, verdicts, percentiles, CPU time, the head line."""

from __future__ import annotations

import os
import platform
import random
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from corpus import SEED
from plots import Chart


@dataclass(frozen=True, slots=True)
class Sample:
    """One quantity, measured once in each round of a run. At least one value."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, reference: Sample) -> Sample:
        """The ratio to `reference`, round by round: what slowed the machine in one round slowed both."""
        pairs = zip(self.values, reference.values, strict=True)
        return Sample(tuple(ours / theirs if theirs else float("nan") for ours, theirs in pairs))

    def to_json(self) -> dict[str, object]:
        return {"median": self.median, "low": self.low, "high": self.high, "values": list(self.values)}

    def __str__(self) -> str:
        if self.low == self.high:
            return digits(self.median)
        return f"{digits(self.median)} ({digits(self.low)}-{digits(self.high)})"


Cell = str | int | float | Sample
Grid = list[list[Cell]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading; `note` says how they were taken."""

    title: str
    heading: Sequence[str]
    rows: Grid
    note: str = ""

    def text(self) -> str:
        """For a terminal: numbers to the right, in columns of equal width."""
        lines = [list(self.heading), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ["  ".join(_padded(line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, *([self.note] if self.note else []), "", *aligned])

    def markdown(self) -> str:
        lines = [self.heading, ["---", *["---:"] * (len(self.heading) - 1)], *self._cells()]
        grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"### {self.title}", *([self.note] if self.note else []), grid])

    def to_json(self) -> dict[str, object]:
        rows = [[each.to_json() if isinstance(each, Sample) else each for each in row] for row in self.rows]
        return {"title": self.title, "note": self.note, "heading": list(self.heading), "rows": rows}

    def _cells(self) -> list[list[str]]:
        return [[digits(cell) if isinstance(cell, int | float) else str(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Target:
    """What a number has to be, at least or at most."""

    name: str
    measured: Sample
    bound: Literal[">=", "<="]
    limit: float

    @property
    def met(self) -> bool:
        """By the median. What could not be measured (nan) is not met."""
        return self.measured.median >= self.limit if self.bound == ">=" else self.measured.median <= self.limit

    def row(self) -> list[Cell]:
        return [self.name, self.measured, f"{self.bound} {digits(self.limit)}", "met" if self.met else "MISSED"]


@dataclass(frozen=True, slots=True)
class Report:
    """What one suite found."""

    tables: Sequence[Table]
    targets: Sequence[Target] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how often to measure. `seconds` is one closed-loop run; `quick` shrinks every size.

    `options` are those of one suite alone, by name; an option that was not given is not there.
    """

    repeats: int = 5
    seconds: float = 1.0
    quick: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Rounds:
    """Values gathered round by round, by name; each name becomes a Sample."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Sample:
        return Sample(tuple(self.values[name]))

    def of(self, name: str, figures: Iterable[str]) -> list[Sample]:
        """The samples of "`name` figure", for each of `figures`."""
        return [self[f"{name} {figure}"] for figure in figures]


def verdicts(targets: Iterable[Target]) -> Table:
    return Table("Targets", ["target", "measured", "wanted", "verdict"], [target.row() for target in targets])


def digits(value: float) -> str:
    """Three significant digits, and every digit of a large whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int_or_nan(value) else f"{value:.3g}"


def int_or_nan(value: float) -> float:
    return float(int(value)) if value == value and abs(value) != float("inf") else float("nan")


def percentile(values: Collection[float], share: float) -> float:
    """The smallest of `values` that at least `share` (0 to 1) of them do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))] if ordered else float("nan")


def interval_of_median(values: Sequence[float], share: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """The bounds between which `share` of the medians of resampled `values` lie (bootstrap); the same each time."""
    chance = random.Random(SEED)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return percentile(medians, (1 - share) / 2), percentile(medians, (1 + share) / 2)


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds so far of these processes' living threads, to the nanosecond; an ended thread's are forgotten."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                total += int(task.read_text().split()[0])
    return total / 1e9


def children(pid: int) -> list[int]:
    """The processes `pid` started and that live."""
    with suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def machine() -> Mapping[str, str]:
    """Where and with what a run is made, but for the server."""
    versions = ("millstream", "redis", "hiredis", "numpy", "torch", "sentence-transformers")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {_cpu_model()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "versions": ", ".join([f"python {platform.python_version()}", *filter(None, map(_version, versions))]),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(line, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
