"""What a worker costs that has nothing to do: round trips to the server, and CPU; beside a raw worker's.

Each on a server of its own, both at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import cast

from measure import Effort, Grid, Report, Rounds, Table, Target, cpu_s
from stage import Stage, echo, staged

SERVICE = echo("bench")
LEAST_S, QUICK_S = 20.0, 2.0
"""In all rounds together."""

CALM_S = 3.0
COMMANDS = ("evalsha", "xreadgroup", "hgetall", "hget", "get")


def measure(stage: Stage, effort: Effort) -> Report:
    rounds = Rounds()
    with staged() as other:
        team, raw = stage.workers(SERVICE, 1), other.python("reference.py", other.url)
        time.sleep(CALM_S)
        seconds = (QUICK_S if effort.quick else max(LEAST_S, LEAST_S * effort.seconds)) / effort.repeats
        for _ in range(effort.repeats):
            watch(rounds, {"client": (stage, team.workers), "raw": (other, [raw.pid])}, seconds)
    return report(rounds, seconds * effort.repeats)


def watch(rounds: Rounds, both: Mapping[str, tuple[Stage, Sequence[int]]], seconds: float) -> None:
    """Do nothing for so long, and note what each did meanwhile, a second."""
    before = {kind: (reads(stage), calls(stage), cpu_s(pids)) for kind, (stage, pids) in both.items()}
    began = time.perf_counter()
    time.sleep(seconds)
    for kind, (stage, pids) in both.items():
        lasted = time.perf_counter() - began
        read, called, cpu = before[kind]
        # Less our own: the question after `before`'s first one, and the one that is asking.
        rounds.add(f"{kind} trips", (reads(stage) - read - 2) / lasted)
        rounds.add(f"{kind} cpu", 100 * (cpu_s(pids) - cpu) / lasted)
        for name, count in calls(stage).items():
            rounds.add(f"{kind} {name}", (count - called[name]) / lasted)


def reads(stage: Stage) -> int:
    """Reads from clients' sockets so far: one a round trip, however many commands a pipeline or a script has."""
    return int(cast(Mapping[str, int], stage.connection.client.info("stats"))["total_reads_processed"])


def calls(stage: Stage) -> dict[str, int]:
    """Calls so far of each of COMMANDS, those inside scripts included."""
    stats = cast(Mapping[str, Mapping[str, int]], stage.connection.client.info("commandstats"))
    return {name: int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in COMMANDS}


def report(rounds: Rounds, seconds: float) -> Report:
    meanings = {"trips": "round trips/s", "cpu": "CPU, % of a core"} | {name: f"{name}/s" for name in COMMANDS}
    rows: Grid = [[meaning, rounds[f"client {name}"], rounds[f"raw {name}"]] for name, meaning in meanings.items()]
    table = Table("An idle worker", ["what", "millstream", "raw"], rows, f"Over {seconds:.0f} s.")
    targets = [
        Target("idle worker, round trips a second", rounds["client trips"], "<=", 4.0),
        Target("idle worker, CPU, % of a core", rounds["client cpu"], "<=", 1.0),
    ]
    return Report([table], targets)
