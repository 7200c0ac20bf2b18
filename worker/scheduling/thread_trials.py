"""Decides how many threads the next forward runs on, by the time that forwards take while a worker works. Pure.

Beside another busy process each operation of a forward waits for a thread whose core is taken, so more threads can be
slower than fewer. Now and then a few forwards run on the next smaller or larger number of threads: a trial. The number
that is faster is kept. A trial begins at once if forwards get much slower than they were. Forwards of all sizes count:
each is compared with the usual time of its size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

RECENT = 5
"""Forwards by which the present number of threads is judged."""

LEAST, MOST = 2, 5
"""Forwards of a trial, if all of them are clearly faster or slower, and if not."""

UNKNOWN = 3
"""Forwards of sizes without a usual time that end a trial: it would tell nothing."""

GAIN = 1.05
"""Factor by which another number of threads must be faster to be kept."""

CLEAR, HOPELESS = 1.3, 4.0
"""Factors: if each forward of a trial is faster by CLEAR, or each is slower, the trial ends early. It ends at once with
a forward that is HOPELESS times slower."""

SLOWER = 1.25
"""Factor by which forwards must get slower for a trial to begin at once."""

MOST_LOST = 0.02
"""Part of the time that trials may cost: the time by which their forwards are slower than others."""

BURST = 16.0
"""Time of a forward times this: the most that trials may cost in a row, and what the first ones may."""

FIRST_WAIT_S, MOST_WAIT_S = 1.0, 30.0
"""Seconds of forwards from one trial to the next. The wait doubles with each one that changed nothing."""

DRIFT = 0.05
"""Weight of the newest forwards in the pace that counts as usual."""

SIZES_IN_OCTAVE = 4
"""Sizes of forwards between a number of tokens and its double, whose usual times are kept apart."""

SURE, LEARN = 3, 0.1
"""Forwards of a size of which the fastest is its usual time, and the weight of each later one."""


class Timed(NamedTuple):
    """A forward: its seconds, and the usual seconds of its size."""

    seconds: float
    usual: float

    @property
    def pace(self) -> float:
        return self.seconds / self.usual


class UsualTimes:
    """Usual seconds of a forward by its size. Only their ratios count: they say what a size costs beside another."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, float]] = {}

    def of(self, tokens: int) -> float | None:
        """Usual seconds of a forward over `tokens`; None until two were seen: the first prepares for its size."""
        seen, seconds = self._found.get(_size(tokens), (0, 0.0))
        return seconds if seen > 1 else None

    def learn(self, tokens: int, seconds: float) -> None:
        size = _size(tokens)
        seen, before = self._found.get(size, (0, seconds))
        usual = min(before, seconds) if seen < SURE else before + LEARN * (seconds - before)
        self._found[size] = (seen + 1, usual)


def rungs(most: int) -> list[int]:
    """Numbers of threads to try, up to `most`: each power of two, and the number halfway to the next one."""
    powers = [2**power for power in range(most.bit_length())]
    return sorted({most, *(each for power in powers for each in (power, power * 3 // 2) if each < most)})


@dataclass(slots=True)
class Trial:
    """Forwards on another number of threads, and the seconds by which they were slower than others.

    `unknown`: how many of them had no usual time.
    """

    timed: list[Timed] = field(default_factory=list)
    unknown: int = 0
    lost_s: float = 0.0

    def add(self, timed: Timed | None, usual: float | None, lost_s: float) -> None:
        """Adds a forward whose size has the `usual` seconds, if any. It counts for the pace if it is `timed`."""
        self.lost_s += lost_s
        self.unknown += usual is None
        if timed:
            self.timed.append(timed)

    def won(self, pace: float) -> bool | None:
        """Whether its number is faster than `pace`; None if it goes on."""
        factors = [each.pace / pace for each in self.timed]
        if any(each > HOPELESS for each in factors):
            return False
        if len(factors) >= LEAST and (max(factors) * CLEAR < 1 or min(factors) > CLEAR):
            return max(factors) < 1
        if len(factors) >= MOST:
            return _pace(self.timed) * GAIN < pace
        return False if self.unknown >= UNKNOWN else None


class ThreadTrials:
    """Number of threads of one model's forwards, at most `most`; `started` at the beginning.

    `count`: for the next forward. `settled`: the number outside of trials.
    """

    def __init__(self, most: int, started: int) -> None:
        self.count = self.settled = started
        self._rungs = sorted({*rungs(most), started})
        self._usual = UsualTimes()
        self._recent: deque[Timed] = deque(maxlen=RECENT)
        # Paces of the recent forwards, and of those before them; 0.0 until they were seen.
        self._pace, self._usual_pace = 1.0, 0.0
        # The first forward on another number starts threads and prepares kernels for it, so it counts for nothing.
        self._is_first = True
        self._trial: Trial | None = None
        self._others = self._nearest(upward=False)
        self._busy_s = self._next_s = 0.0
        self._wait_s = FIRST_WAIT_S
        self._may_lose_s = math.inf
        # Times by number of threads, as factors of the settled one's: those of the last trials.
        self._factors: dict[int, float] = {}

    def observe(self, tokens: int, seconds: float) -> None:
        """Notes that a forward over `tokens`, at least one, took `seconds` on `count` threads."""
        self._busy_s += seconds
        first, self._is_first = self._is_first, False
        usual = self._usual.of(tokens)
        timed = Timed(seconds, usual) if usual and not first else None
        if self._trial:
            self._trial.add(timed, usual, seconds - (usual or 0.0) * self._pace)
            won = self._trial.won(self._pace)
            if won is not None:
                self._end(self._trial, won)
        elif not first:
            self._note(timed, seconds)
            # As if at the usual pace: a size that is first seen beside a busy process is no cheaper than others.
            self._usual.learn(tokens, seconds / self._pace)
            # Other sizes may follow, but most follow one of their own.
            if timed and (other := self._due()):
                self.count, self._trial, self._is_first = other, Trial(), True

    def _note(self, timed: Timed | None, seconds: float) -> None:
        if timed:
            self._recent.append(timed)
        if len(self._recent) == RECENT:
            self._pace = _pace(self._recent)
            self._usual_pace += (DRIFT if self._usual_pace else 1.0) * (self._pace - self._usual_pace)
            self._may_lose_s = min(self._may_lose_s + MOST_LOST * seconds, BURST * self._mean_s)

    @property
    def _mean_s(self) -> float:
        """Mean seconds of the recent forwards."""
        return sum(each.seconds for each in self._recent) / RECENT

    def _due(self) -> int | None:
        """Number of threads to try now; None if no trial is to begin."""
        if len(self._recent) < RECENT or len(self._rungs) == 1:
            return None
        if self._pace > SLOWER * self._usual_pace:
            self._next_s, self._wait_s, self._others = self._busy_s, FIRST_WAIT_S, self._nearest(upward=False)
        if self._busy_s < self._next_s:
            return None
        other = next((each for each in self._others if self._risk(each) <= BURST), None)
        return other if other and self._risk(other) * self._mean_s <= self._may_lose_s else None

    def _risk(self, other: int) -> float:
        """Returns the cost of the shortest trial in forwards: as the last time, else as the ratio of threads allows."""
        forwards = LEAST + 1
        if factor := self._factors.get(other):
            # However slow it was: it may be fast now.
            return min(BURST, forwards * max(0.0, factor - 1))
        return forwards * (max(other / self.settled, self.settled / other) - 1)

    def _nearest(self, *, upward: bool) -> list[int]:
        """The other numbers of threads, the nearest first. Of two equally near ones the larger is first if `upward`."""
        at = {count: place for place, count in enumerate(self._rungs)}
        here = at.pop(self.settled)
        return sorted(at, key=lambda each: (abs(at[each] - here), (at[each] > here) != upward))

    def _end(self, trial: Trial, won: bool) -> None:
        self._may_lose_s -= max(0.0, trial.lost_s)
        factor = _pace(trial.timed) / self._pace if trial.timed else 1.0
        upward = self.count > self.settled
        if won:
            self._factors = {self.settled: 1 / factor}
            self.settled, self._wait_s = self.count, FIRST_WAIT_S
            self._others, self._pace = self._nearest(upward=upward), self._pace * factor
            # The next number in this direction is tried at once.
            wait_s = 0.0 if (self._others[0] > self.settled) == upward else self._wait_s
        elif not trial.timed:
            self._is_first, wait_s = True, self._wait_s
        else:
            self._factors[self.count], self._is_first = factor, True
            self._others.remove(self.count)
            self._others.append(self.count)
            self._wait_s = wait_s = min(2 * self._wait_s, MOST_WAIT_S)
        self._usual_pace, self._next_s = self._pace, self._busy_s + wait_s
        self.count, self._trial = self.settled, None
        self._recent.clear()


def _pace(forwards: Collection[Timed]) -> float:
    """Time of `forwards`, as a factor of the usual; without the fastest and the slowest of many."""
    ordered = sorted(forwards, key=lambda each: each.pace)
    middle = ordered[1:-1] if len(ordered) > LEAST else ordered
    return sum(each.seconds for each in middle) / sum(each.usual for each in middle)


def _size(tokens: int) -> int:
    return round(SIZES_IN_OCTAVE * math.log2(max(1, tokens)))
