"""Chooses the threads of a forward: as many as are fastest for this model, of the cores that are this process's.

A tiny model is faster on one thread than on two, a large one on as many as there are, and beside a busy neighbour both
change: so it is measured as a worker starts. What is left to the operator is what the environment says.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.measuring.cores import Claims
from millstream.worker.measuring.probe import Clock, run
from millstream.worker.measuring.tuning import mix
from millstream.worker.models.base import Model, Placed, Prepared

log = logging.getLogger(__name__)

THREADS = "OMP_NUM_THREADS"
SPIN = "GOMP_SPINCOUNT"
POLICY = "OMP_WAIT_POLICY"
SPINS = 10_000
"""Rounds that a thread of GNU OpenMP waits for the others before it sleeps. By default it goes on for so long that a
forward beside a busy process loses a fifth; with no round at all each operation costs a system call."""

GAIN = 1.03
"""More threads are taken if they are faster by this factor."""

MUCH_SLOWER = 2.0
"""A number of threads that is slower by this factor is not measured again, nor is a smaller one."""

FORWARD_S, MEASURE_S, SLOW_S = 0.1, 1.5, 1.0
"""Seconds: of a forward to measure with, of all measuring, and of a forward of one row that is not measured at all."""

ROUNDS, MOST_ROWS = 7, 16

Use = Callable[[int], None]
"""Makes the calling thread's next forwards run on so many threads."""


def waiting(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to set before a process loads torch, unless the operator chose another way."""
    return {} if SPIN in environ or POLICY in environ else {SPIN: str(SPINS)}


def describe_waiting(environ: Mapping[str, str]) -> str:
    """The environment's words on how threads wait for each other; "" if it does not."""
    return " ".join(f"{name}={environ[name]}" for name in (SPIN, POLICY) if name in environ)


def operator_threads(environ: Mapping[str, str]) -> int | None:
    """The number of threads that the operator set; None if there is none, or it is no number."""
    first = environ.get(THREADS, "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def counts(most: int) -> list[int]:
    """The numbers of threads to try, the largest first: `most`, and the powers of two below it."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power < most)}, reverse=True)


def measure(model: Model, most: int, use: Use, clock: Clock = time.perf_counter) -> dict[int, float]:
    """Tokens a second by number of threads, up to `most`; empty if one row takes SLOW_S, or there is too little memory.

    Raises ModelUnavailable if the model fails.
    """
    try:
        rows = _rows(model, most, use, clock)
        return _measured(model, rows, most, use, clock) if rows else {}
    except MemoryError as error:
        log.warning("how many threads are fastest could not be measured: %s", error)
        return {}


def _measured(model: Model, rows: Sequence[Prepared], most: int, use: Use, clock: Clock) -> dict[int, float]:
    """The numbers take turns, so that what else runs on the host slows all of them alike."""
    began = clock()
    rates: dict[int, list[float]] = {}
    for count in counts(most):
        rates[count] = [_rate(model, rows, count, use, clock)]
        if MUCH_SLOWER * rates[count][0] < max(each for (each,) in rates.values()):
            break
    best = max(each for (each,) in rates.values())
    tried = [count for count, (rate,) in rates.items() if MUCH_SLOWER * rate >= best]
    for _ in range(ROUNDS - 1):
        if len(tried) == 1 or clock() - began > MEASURE_S:
            break
        for count in tried:
            if clock() - began > MEASURE_S:
                break
            rates[count].append(_rate(model, rows, count, use, clock))
    return {count: median(each) for count, each in rates.items()}


def fastest(rates: Mapping[int, float], most: int) -> int:
    """The fewest threads, of at most `most`, that are nearly as fast as any; `most` if nothing was measured."""
    allowed = {count: rate for count, rate in rates.items() if count <= most}
    best = max(allowed.values(), default=0.0)
    return min((count for count, rate in allowed.items() if GAIN * rate >= best), default=most)


def _rows(model: Model, most: int, use: Use, clock: Clock) -> Sequence[Prepared]:
    """Rows of typical lengths whose forward takes about FORWARD_S; none if one row takes SLOW_S."""
    use(most)
    # Of several lengths: rows of one length need fewer operations than a worker's batches do.
    rows = mix(model, MOST_ROWS)
    typical = sorted(rows, key=lambda row: row.tokens)[len(rows) // 2 :][:1]
    # The first forward loads what all others find loaded.
    run(model, typical)
    seconds = _seconds(model, typical, clock)
    return [] if seconds > SLOW_S else rows[: max(1, int(FORWARD_S / max(seconds, 1e-9)))]


def _rate(model: Model, rows: Sequence[Prepared], count: int, use: Use, clock: Clock) -> float:
    use(count)
    # The first forward after a change starts threads, or ends them.
    run(model, rows)
    return sum(row.tokens for row in rows) / max(_seconds(model, rows, clock), 1e-9)


def _seconds(model: Model, rows: Sequence[Prepared], clock: Clock) -> float:
    """A forward's, over as many as take half of FORWARD_S."""
    began, forwards = clock(), 0
    while not forwards or clock() - began < FORWARD_S / 2:
        run(model, rows)
        forwards += 1
    return (clock() - began) / forwards


class Threads:
    """The threads of one process's forwards. `look` may be called by another thread than all else.

    `most` is the part of the host's cores that its supervisor gave it; `claims`, if there are any, say how many other
    workers share them.
    """

    def __init__(self, most: int, environ: Mapping[str, str] = os.environ, claims: Claims | None = None) -> None:
        self._operator = operator_threads(environ)
        self._waiting = describe_waiting(environ)
        self._claims = claims
        self._most = most
        self._model: Model | None = None
        self._use: Use = lambda count: None
        self.clock: Clock = time.perf_counter
        self.rates: Mapping[int, float] = {}
        self.share = self._share()
        self._chosen_for = self.share
        self.count = self._operator or self.share

    @classmethod
    def unmanaged(cls) -> Threads:
        """The threads of a process whose forwards are its own affair."""
        return cls(1, {})

    def choose(self, model: Model, use: Use) -> None:
        """Measure what is fastest for `model`, and use it. In the thread that runs forwards. Raises ModelUnavailable.

        Only the threads of torch on the CPU can be changed once a model is loaded.
        """
        if not isinstance(model, Placed):
            return
        if model.device_type != "cpu":
            self._leave()
        elif model.backend == "torch":
            self._model, self._use = model, use
            self.share = self._share()
            self._choose(model)

    def update_share(self) -> None:
        """See how many cores are this worker's now."""
        if self._model:
            self.share = self._share()

    def adapt(self, *, idle: bool) -> None:
        """Use another number of threads if the share changed. In the thread that runs forwards, between two of them.

        More threads than were measured are measured only if the process is `idle` beside this forward.
        """
        if not self._model or self.share == self._chosen_for:
            return
        if self._must_measure(self.share) and not idle:
            self._assume()
            return
        before = self.count
        try:
            self._choose(self._model)
        except ModelUnavailable as error:
            self._use(before)
            log.warning("the threads stay as they are: %s", error)
        if self.count != before:
            log.info("the share of this host's cores is now %d: %s", self._chosen_for, self)

    def _assume(self) -> None:
        """Takes it that more threads help, until they are measured, if the most that were measured helped."""
        most = max(self.rates, default=1)
        if self.count != self.share and fastest(self.rates, most) == most:
            self.count = self.share
            self._use(self.count)

    def _must_measure(self, share: int) -> bool:
        return not self._operator and share > max(self.rates, default=1)

    def _share(self) -> int:
        return min(self._most, self._claims.share) if self._claims else self._most

    def _choose(self, model: Model) -> None:
        share = self._chosen_for = self.share
        if self._operator:
            self._use(self._operator)
            return
        if self._must_measure(share):
            self.rates = measure(model, share, self._use, self.clock)
        self.count = fastest(self.rates, share)
        self._use(self.count)

    def _leave(self) -> None:
        if self._claims:
            self._claims.leave()
            self._claims = None

    def __str__(self) -> str:
        how = f" ({THREADS})" if self._operator else " (measured)" if self.count in self.rates else ""
        waits = f", {self._waiting}" if self._waiting else ""
        return f"{self.count} thread{'s' if self.count > 1 else ''}{how}{waits}"
