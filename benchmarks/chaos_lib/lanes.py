"""When which fault happens: lanes that run side by side, each doing its own faults one after the other, by a seed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median

from chaos_lib.faults import Fault, Landing, Missed
from chaos_lib.site import Site

INSIST_S = 60.0
"""How much longer a kind of fault is tried that has not landed."""

PAUSE_S = 0.5
"""Between two such tries: a miss may take no time at all."""


@dataclass
class Record:
    """What became of one kind of fault. A miss is a reason.

    `spans` are the beginning and the end, server ms, of each that was tried: the server's clock is this machine's.
    """

    landed: list[Landing] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def recoveries(self) -> list[float]:
        return [landing.recovery_s for landing in self.landed if landing.recovery_s is not None]

    def recovery(self) -> tuple[float, float] | None:
        """Median and maximum, seconds."""
        return (median(self.recoveries), max(self.recoveries)) if self.recoveries else None


@dataclass(frozen=True)
class Lane:
    """Faults that exclude each other. `kinds`: name -> the fault and the seconds it takes; `weights` as often in a bag.

    `gap_s` is the longest rest between two, `least_gap_s` the shortest.
    """

    kinds: Mapping[str, tuple[Fault, float]]
    gap_s: float
    weights: Mapping[str, int] = field(default_factory=dict)
    least_gap_s: float = 0.0

    def bag(self, chance: Random) -> list[str]:
        """Each kind as often as its weight says, in any order."""
        names = [name for name in self.kinds for _ in range(self.weights.get(name, 1))]
        return chance.sample(names, len(names))


class Driver(threading.Thread):
    """Runs one lane until `until` (monotonic seconds); it begins nothing that would not be over by then,
    but for kinds that have not landed yet."""

    def __init__(self, lane: Lane, site: Site, chance: Random, until: float, records: Mapping[str, Record]) -> None:
        super().__init__(name=next(iter(lane.kinds)), daemon=True)
        self._lane = lane
        self._site = site
        self._chance = chance
        self._until = until
        self._records = records

    def run(self) -> None:
        while time.monotonic() < self._until:
            for name in self._lane.bag(self._chance):
                self._rest(self._chance.uniform(self._lane.least_gap_s, self._lane.gap_s))
                if time.monotonic() + self._lane.kinds[name][1] <= self._until:
                    self._inject(name)
        for name in self._lane.kinds:
            self._insist(name)

    def _insist(self, name: str) -> None:
        """A run shows nothing of a kind that never landed: it is tried beyond the time, until it lands or INSIST_S."""
        until = time.monotonic() + INSIST_S
        while not self._records[name].landed and time.monotonic() < until:
            self._inject(name)
            if not self._records[name].landed:
                time.sleep(PAUSE_S)

    def _rest(self, seconds: float) -> None:
        time.sleep(max(0.0, min(seconds, self._until - time.monotonic())))

    def _inject(self, name: str) -> None:
        fault, _ = self._lane.kinds[name]
        record, began = self._records[name], _now_ms()
        try:
            record.landed.append(fault(self._site, self._chance))
        except Missed as error:
            record.missed.append(str(error))
        except Exception as error:  # noqa: BLE001 - one fault that failed is reported; the others go on
            record.missed.append(f"{type(error).__name__}: {error}"[:200])
        record.spans.append((began, _now_ms()))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def drive(lanes: Sequence[Lane], site: Site, seed: str, seconds: float, records: dict[str, Record]) -> None:
    """Run all lanes side by side for `seconds`, and add what became of each kind to `records`."""
    for name in (name for lane in lanes for name in lane.kinds):
        records.setdefault(name, Record())
    until = time.monotonic() + seconds
    drivers = [Driver(lane, site, Random(f"{seed}-{at}"), until, records) for at, lane in enumerate(lanes)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
