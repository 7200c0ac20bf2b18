"""Chooses the number of threads of a forward: the fastest for this model, up to the process's share of cores.

A tiny model is faster on one thread than on two, a large model on all of them, and a busy process on the same host
changes both. So the number is measured when a worker starts, and others are tried while it works. Environment variables
of the operator limit it, or fix it.
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
from millstream.worker.scheduling.thread_trials import ThreadTrials

log = logging.getLogger(__name__)

THREADS = "OMP_NUM_THREADS"
SPIN = "GOMP_SPINCOUNT"
POLICY = "OMP_WAIT_POLICY"
DYNAMIC = "OMP_DYNAMIC"

SPINS = 3_000
"""Rounds that a thread of GNU OpenMP waits for the others before it sleeps. The default is so long that a forward takes
twice its time if another process is busy; with no round at all, each operation costs a system call."""

GAIN = 1.03
"""Factor by which more threads must be faster to be preferred."""

MUCH_SLOWER = 2.0
"""Factor: a number of threads that is slower by it is not measured again, and smaller numbers not at all."""

FORWARD_S, MEASURE_S, SLOW_S = 0.1, 1.5, 1.0
"""Seconds: of a measured forward, of the whole measurement, and of a forward of one row that is too slow to measure."""

ROUNDS, MOST_ROWS = 7, 16
"""Rates measured for each number of threads, and rows of a measured forward, at most."""

Use = Callable[[int], None]
"""Makes the calling thread's next forwards run on this number of threads."""


def waiting(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables to set before a process loads torch; empty if the operator set one of them."""
    return {} if SPIN in environ or POLICY in environ else {SPIN: str(SPINS)}


def describe_waiting(environ: Mapping[str, str]) -> str:
    """The variables that say how threads wait for each other, as `NAME=value`; "" if none is set."""
    return " ".join(f"{name}={environ[name]}" for name in (SPIN, POLICY) if name in environ)


def operator_threads(environ: Mapping[str, str]) -> int | None:
    """Number of threads that the operator set; None if it is not set, or is no number."""
    first = environ.get(THREADS, "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def fixes_threads(environ: Mapping[str, str]) -> bool:
    """Whether the operator forbids other numbers of threads than the one at the start."""
    return environ.get(DYNAMIC, "").strip().lower() in ("false", "0")


def counts(most: int) -> list[int]:
    """Numbers of threads to try, the largest first: `most`, and the powers of two below it."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power < most)}, reverse=True)


def measure(model: Model, most: int, use: Use, clock: Clock = time.perf_counter) -> dict[int, float]:
    """Tokens a second by number of threads, up to `most`; empty if one row takes SLOW_S, or if memory runs out.

    Raises ModelUnavailable if the model fails.
    """
    try:
        rows = _rows(model, most, use, clock)
        return _measured(model, rows, most, use, clock) if rows else {}
    except MemoryError as error:
        log.warning("the fastest number of threads could not be measured: %s", error)
        return {}


def _measured(model: Model, rows: Sequence[Prepared], most: int, use: Use, clock: Clock) -> dict[int, float]:
    """Median rate by number of threads. The numbers take turns, so that other load on the host slows all of them."""
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
    """The fewest threads, up to `most`, that are within GAIN of the fastest; `most` if none was measured."""
    allowed = {count: rate for count, rate in rates.items() if count <= most}
    best = max(allowed.values(), default=0.0)
    return min((count for count, rate in allowed.items() if GAIN * rate >= best), default=most)


def _rows(model: Model, most: int, use: Use, clock: Clock) -> Sequence[Prepared]:
    """Rows of typical lengths whose forward takes about FORWARD_S; none if one row takes SLOW_S."""
    use(most)
    # Several lengths, as in a worker's batches: rows of one length need fewer operations.
    rows = mix(model, MOST_ROWS)
    typical = sorted(rows, key=lambda row: row.tokens)[len(rows) // 2 :][:1]
    # The first forward loads kernels and memory; the others find them loaded.
    run(model, typical)
    seconds = _seconds(model, typical, clock)
    return [] if seconds > SLOW_S else rows[: max(1, int(FORWARD_S / max(seconds, 1e-9)))]


def _rate(model: Model, rows: Sequence[Prepared], count: int, use: Use, clock: Clock) -> float:
    use(count)
    # The first forward after a change starts or ends threads, so it is not measured.
    run(model, rows)
    return sum(row.tokens for row in rows) / max(_seconds(model, rows, clock), 1e-9)


def _seconds(model: Model, rows: Sequence[Prepared], clock: Clock) -> float:
    """Mean seconds of a forward, over FORWARD_S / 2 seconds, at least one forward."""
    began, forwards = clock(), 0
    while not forwards or clock() - began < FORWARD_S / 2:
        run(model, rows)
        forwards += 1
    return (clock() - began) / forwards


class Threads:
    """Number of threads of one process's forwards. `update_share` may be called by another thread than the rest.

    `most`: the part of the host's cores that its supervisor assigned. `claims`, if given, counts the other workers that
    share them.
    """

    def __init__(self, most: int, environ: Mapping[str, str] = os.environ, claims: Claims | None = None) -> None:
        self._operator = operator_threads(environ)
        self._is_fixed = fixes_threads(environ)
        self._trials: ThreadTrials | None = None
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
        """Threads of a process that sets them itself: nothing is measured or changed."""
        return cls(1, {})

    def choose(self, model: Model, use: Use) -> None:
        """Measures the fastest number of threads for `model`, and uses it. Raises ModelUnavailable.

        Must be called in the thread that runs forwards. Only the threads of torch on the CPU can be changed after a
        model is loaded; for other models nothing is done.
        """
        if not isinstance(model, Placed):
            return
        if model.device_type != "cpu":
            self._leave()
        elif model.backend == "torch":
            self._model, self._use = model, use
            self.share = self._share()
            self._choose(model)

    def forget(self) -> None:
        """Drops the model. The measured rates hold for its next load."""
        self._model = None
        self._use = lambda count: None

    def update_share(self) -> None:
        """Updates this worker's share of the host's cores."""
        if self._model:
            self.share = self._share()

    def apply(self) -> None:
        """Uses the chosen number again, if another model of this process ran its forwards meanwhile."""
        if self._model:
            self._use(self._trials.count if self._trials else self.count)

    def observe(self, tokens: int, seconds: float) -> None:
        """Notes the time of a forward over `tokens`, and uses another number of threads if that is to be tried.

        Must be called in the thread that runs forwards, after each of them. No number is tried beyond the share, or
        beyond that of the operator.
        """
        if self._trials is None or not tokens:
            return
        before = self._trials.count
        self._trials.observe(tokens, seconds)
        if self._trials.count != before:
            self._use(self._trials.count)
        if self._trials.settled != self.count:
            log.info("threads of a forward: %d instead of %d, which is faster now", self._trials.settled, self.count)
            self.count = self._trials.settled

    def adapt(self, *, idle: bool) -> None:
        """Uses another number of threads if the share changed.

        Must be called in the thread that runs forwards, between two of them. More threads than were measured are
        measured now only if no other rows wait (`idle`).
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
            self._settle(before)
            log.warning("the number of threads stays unchanged: %s", error)
        if self.count != before:
            log.info("the share of this host's cores is now %d: %s", self._chosen_for, self)

    def _assume(self) -> None:
        """Uses all threads of the share until they are measured, if the largest measured number was the fastest."""
        most = max(self.rates, default=1)
        if self.count != self.share and fastest(self.rates, most) == most:
            self._settle(self.share)

    def _must_measure(self, share: int) -> bool:
        return not self._operator and share > max(self.rates, default=1)

    def _share(self) -> int:
        return min(self._most, self._claims.share) if self._claims else self._most

    def _choose(self, model: Model) -> None:
        share = self._chosen_for = self.share
        if self._must_measure(share):
            self.rates = measure(model, share, self._use, self.clock)
        self._settle(self._operator or fastest(self.rates, share))

    def _settle(self, count: int) -> None:
        """Uses this number of threads, and forgets what was tried."""
        self.count = count
        most = self._operator or max(count, self._chosen_for)
        self._trials = ThreadTrials(most, count) if most > 1 and not self._is_fixed else None
        self._use(count)

    def _leave(self) -> None:
        if self._claims:
            self._claims.leave()
            self._claims = None

    def __str__(self) -> str:
        how = f" ({THREADS})" if self._operator else " (measured)" if self.count in self.rates else ""
        waits = f", {self._waiting}" if self._waiting else ""
        return f"{self.count} thread{'s' if self.count > 1 else ''}{how}{waits}"
