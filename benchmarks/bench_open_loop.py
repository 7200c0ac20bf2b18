"""Callers who do not wait for each other: calls at the times of a Poisson process, up to more than the queue can do.

The capacity is what a closed loop reaches just before. A latency counts from when a call was due. Beyond the capacity
the queue fills up to `max_queue_size`, and then refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from driver import Order
from measure import Effort, Grid, Report, Rounds, Table
from plots import Chart
from stage import Driver, Stage, echo

SERVICE = echo("bench", "vector:384", max_queue_size=500)
SHARES, QUICK_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2), (0.5, 1.2)
AT_ONCE = 256
LENGTH = 200
KINDS = ("client", "raw")
FIGURES = ("p50", "p99", "p999")


def measure(stage: Stage, effort: Effort) -> Report:
    shares = QUICK_SHARES if effort.quick else SHARES
    stage.python("reference.py", stage.url)
    stage.workers(SERVICE, 1)
    drivers = {"client": stage.driver("client", SERVICE.name), "raw": stage.driver("raw")}
    capacity = {kind: closed(driver, effort) for kind, driver in drivers.items()}
    rounds = Rounds()
    for _ in range(effort.repeats):
        for share in shares:
            for kind, driver in drivers.items():
                for figure, value in opened(driver, share * capacity["client"], effort).items():
                    rounds.add(f"{share} {kind} {figure}", value)
    return report(rounds, shares, capacity)


def closed(driver: Driver, effort: Effort) -> float:
    """Calls a second of the second of two runs."""
    return [driver.run(Order("async", AT_ONCE, effort.seconds, LENGTH)).rate for _ in range(2)][-1]


def opened(driver: Driver, rate: float, effort: Effort) -> Mapping[str, float]:
    result = driver.run(Order("open", seconds=2 * effort.seconds, length=LENGTH, rate=rate))
    total = result.calls + result.refused + result.failed
    return {figure: getattr(result, figure) for figure in FIGURES} | {
        "refused": 100 * result.refused / total,
        "failed": result.failed,
        "offered": total / (2 * effort.seconds),
    }


def report(rounds: Rounds, shares: Sequence[float], capacity: Mapping[str, float]) -> Report:
    rows: Grid = [
        [
            f"{share:.0%}",
            rounds[f"{share} client offered"].median,
            *rounds.of(f"{share} client", (*FIGURES, "refused", "failed")),
            *rounds.of(f"{share} raw", ("p50", "p99")),
        ]
        for share in shares
    ]
    note = (
        f"Of a capacity of {capacity['client']:,.0f} calls/s (the raw loop's: {capacity['raw']:,.0f}); the raw loop is "
        "offered the same calls, and has no limit."
    )
    heading = ["load", "calls/s", "p50 ms", "p99 ms", "p99.9 ms", "refused %", "failed", "raw p50 ms", "raw p99 ms"]
    series = {
        f"{kind}, {figure}": [(100 * share, rounds[f"{share} {kind} {figure}"].median) for share in shares]
        for kind in KINDS
        for figure in ("p50", "p99")
    }
    chart = Chart("open-loop", "Latency by load", "% of capacity", "ms", series, log="y")
    return Report([Table("Calls at random times", heading, rows, note)], (), [chart])
