"""Compares two checkouts in pairs of short runs: paired.py --old PATH --new PATH, each with a .venv of its own.

Each pair starts server, worker and client of both anew, and runs every measure in the order old, new, new, old; the
next pair begins with the new one. A ratio new / old is taken within a pair, so that load which lasts for minutes slows
both; above 1 the new one is better. A measure is OK if the upper 95 % bound of its median ratio is not below 0.97. Exit
status 1 if one is not.

Both run this checkout's driver.py in their own interpreter, with nothing but the public client and `millstream up`.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal

import click
from checkouts import LENGTH, Checkout, Kind, Mill, working
from corpus import batches
from driver import Order
from measure import Cell, Rounds, Table, digits, interval_of_median, machine

Side = Literal["old", "new"]
SIDES: Sequence[Side] = ("old", "new")

LEAST = 0.97
BACKLOG = 2_000
LIMIT_S = 24 * 60.0
"""No pair begins that would probably not be over by then."""

CALLERS = 128
REST_S = 0.3
"""Seconds after the last answer of a backlog, in which the worker settles what came with it."""

Measured = Callable[[Mill, float], float]


def threads(in_flight: int) -> Measured:
    return lambda mill, seconds: mill.driver.run(Order("threads", in_flight, seconds, LENGTH)).rate


def jobs_a_cpu_second(mill: Mill, seconds: float) -> float:
    """Jobs of a backlog that one second of the worker's CPU does."""
    mill.queue("pause")
    mill.driver.run(Order("send", count=BACKLOG, length=LENGTH))
    before = mill.worker_cpu_s()
    mill.queue("resume")
    # Sent last, answered last.
    mill.driver.run(Order("texts", texts=["the last one"]))
    time.sleep(REST_S)
    return BACKLOG / (mill.worker_cpu_s() - before)


def offline(mill: Mill, seconds: float) -> float:
    return mill.driver.run(Order("texts", texts=mill.texts)).rate


def online(mill: Mill, seconds: float) -> float:
    return mill.driver.run(Order("mix", CALLERS, 2 * seconds)).rate


MEASURES: Mapping[Kind, Mapping[str, Measured]] = {
    "echo": {
        "threads, 256 in flight, calls/s": threads(256),
        "threads, 64 in flight, calls/s": threads(64),
        "threads, 1 in flight, calls/s": threads(1),
        "jobs a second of worker CPU": jobs_a_cpu_second,
    },
    "minilm": {
        "offline embedding, texts/s": offline,
        f"{CALLERS} online callers, texts/s": online,
    },
}


def order_of(pair: int) -> Sequence[Side]:
    """Which side runs first: each one in every other pair."""
    return SIDES if pair % 2 == 0 else SIDES[::-1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`rounds` are the figures of all pairs so far, by measure and side."""

    checkouts: Mapping[Side, Checkout]
    seconds: float
    kinds: Sequence[Kind] = tuple(MEASURES)
    rounds: Rounds = field(default_factory=Rounds)

    def pairs(self, numbers: Sequence[int]) -> None:
        """Run these pairs with the same processes."""
        for kind in self.kinds:
            measures = MEASURES[kind]
            with ExitStack() as ends:
                mills = self._started(kind, order_of(numbers[0]), ends)
                for number, (name, measure) in product(numbers, measures.items()):
                    self._measure(name, partial(_run, measure, mills, self.seconds), order_of(number))

    def _measure(self, name: str, run: Callable[[Side], float], order: Sequence[Side]) -> None:
        """Run it there and back, old, new, new, old: what changes evenly meanwhile weighs alike on both."""
        found: dict[Side, list[float]] = {side: [] for side in order}
        for side in (*order, *reversed(order)):
            found[side].append(run(side))
        for side, figures in found.items():
            self.rounds.add(f"{name} {side}", mean(figures))

    def _started(self, kind: Kind, order: Sequence[Side], ends: ExitStack) -> Mapping[Side, Mill]:
        """Both sides at work, with the same texts."""
        cold = [ends.enter_context(working(self.checkouts[side], kind)) for side in order]
        warm = [mill.warmed_up(kind, self.seconds) for mill in cold]
        texts = min((mill.texts for mill in warm), key=len)
        return {side: replace(mill, texts=texts) for side, mill in zip(order, warm, strict=True)}

    def rows(self) -> list[list[Cell]]:
        return [self._row(name) for kind in self.kinds for name in MEASURES[kind]]

    def _row(self, name: str) -> list[Cell]:
        old, new = self.rounds[f"{name} old"], self.rounds[f"{name} new"]
        ratio = new.over(old)
        low, high = interval_of_median(ratio.values)
        verdict = "OK" if high >= LEAST else "SLOWER"
        return [name, old.median, new.median, f"{ratio.median:.3f}", f"{low:.3f}-{high:.3f}", f"{high:.3f}", verdict]


def _run(measure: Measured, mills: Mapping[Side, Mill], seconds: float, side: Side) -> float:
    return measure(mills[side], seconds)


def compare(run: Callable[[Sequence[int]], None], parts: Iterable[Sequence[int]]) -> int:
    """Run all pairs of `parts`, or as many as fit into LIMIT_S; how many that were."""
    began, done, longest_s = time.monotonic(), 0, 0.0
    for numbers in parts:
        if time.monotonic() - began + longest_s > LIMIT_S:
            break
        part_began = time.monotonic()
        run(numbers)
        longest_s = max(longest_s, time.monotonic() - part_began)
        done += len(numbers)
        click.echo(f"{done} pairs after {time.monotonic() - began:.0f} s", err=True)
    return done


HEADING = ("measure", "old", "new", "new / old", "95 % of the median", "upper bound", "verdict")


def table(comparison: Comparison, pairs: int) -> Table:
    note = f"Medians of {pairs} pairs; above 1 the new one is better. OK: the upper bound is at least {digits(LEAST)}."
    return Table("New / old", HEADING, comparison.rows(), note)


@click.command(help=__doc__)
@click.option("--old", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--new", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", type=click.Choice(list(MEASURES)), help="Only the measures with this one.")
@click.option("--pairs", type=click.IntRange(min=1), default=9, show_default=True)
@click.option(
    "--restart-every", type=click.IntRange(min=1), default=1, show_default=True, help="Pairs with the same processes."
)
@click.option("--seconds", type=click.FloatRange(min=0.2), default=1.0, show_default=True, help="Of one closed loop.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all values there.")
def main(
    old: Path, new: Path, model: Kind | None, pairs: int, restart_every: int, seconds: float, json_file: Path | None
) -> None:
    # Otherwise servers and workers would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    checkouts: Mapping[Side, Checkout] = {"old": Checkout(old.resolve()), "new": Checkout(new.resolve())}
    head = {**machine(), "old": checkouts["old"].described(), "new": checkouts["new"].described()}
    click.echo("\n".join(f"{name}: {value}" for name, value in head.items()) + "\n")
    comparison = Comparison(checkouts, seconds, (model,) if model else tuple(MEASURES))
    done = compare(comparison.pairs, batches(range(pairs), restart_every))
    found = table(comparison, done)
    click.echo(found.text())
    if done < pairs:
        click.echo(f"\nonly {done} of {pairs} pairs in {LIMIT_S / 60:g} minutes: the machine is too busy")
    if json_file:
        json_file.write_text(json.dumps({"run": head, "values": comparison.rounds.values}, indent=2), encoding="utf-8")
    sys.exit(0 if done == pairs and all(row[-1] == "OK" for row in found.rows) else 1)


if __name__ == "__main__":
    main()
