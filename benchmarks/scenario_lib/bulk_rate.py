"""Bulk runs of real texts beside the same packing in one process without a queue, in turn."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

from corpus import batches, mix
from driver import Order
from measure import Report, Rounds, Table, Target, cpu_s
from stage import Driver, Stage, Team, echo

from millstream.client import Client
from scenario_lib.bulk import minilm, read_output, write_input
from scenario_lib.calls import at_least

SERVICE = minilm("bulk")
LEAST_RATE = 0.95
"""Rate of the bulk runs over that of packing without a queue. Neither counts the start of a process."""

PAIRS, FEW_TEXTS = 2, 1_000
"""Pieces of the texts. Each is done both ways, so that what else the machine does weighs on both. Few texts are one."""

WARM_TEXTS = 256
FORWARD_S, BATCH = 0.1, 64
"""Seconds and rows of a forward of the echo service."""


def run(stage: Stage, rows: int) -> Report:
    threads, texts, rounds, targets = len(os.sched_getaffinity(0)), mix(rows), Rounds(), list[Target]()
    team = stage.workers(SERVICE, 1)
    local = Driver(stage.python("local_model.py", json.dumps({"threads": threads, "spec": SERVICE.to_json()})))
    local.run(Order("texts", texts=texts[:WARM_TEXTS], service="packing"))
    for number, piece in enumerate(batches(texts, rows if rows < FEW_TEXTS else -(-rows // PAIRS))):
        # Not always in the same order: the machine may become slower or faster meanwhile.
        if number % 2:
            targets += _bulk(stage, team, rounds, piece, number)
            _pack(local, rounds, piece)
        else:
            _pack(local, rounds, piece)
            targets += _bulk(stage, team, rounds, piece, number)
    ratio, cpu = rounds["bulk rate"].over(rounds["packing rate"]), rounds["bulk cpu"].over(rounds["packing cpu"])
    table = Table(
        f"{rows:,} texts in pieces, {threads} torch threads",
        ["", "texts/s", "CPU ms a text", "of these client.bulk"],
        [
            ["packing in one process", rounds["packing rate"], rounds["packing cpu"], ""],
            ["bulk run", rounds["bulk rate"], rounds["bulk cpu"], rounds["client cpu"]],
            ["bulk run / packing", ratio, cpu, ""],
        ],
    )
    return Report([table], [Target("bulk run / packing without a queue", ratio, ">=", LEAST_RATE), *targets])


def _pack(local: Driver, rounds: Rounds, texts: Sequence[str]) -> None:
    result = local.run(Order("texts", texts=texts, service="packing"))
    rounds.add("packing rate", result.rate)
    rounds.add("packing cpu", 1e3 * result.cpu_s / len(texts))


def _bulk(stage: Stage, team: Team, rounds: Rounds, texts: Sequence[str], number: int) -> list[Target]:
    source, output = stage.home / f"in-{number}.jsonl", stage.home / f"out-{number}"
    write_input(source, texts)
    pids = [stage.server.pid, *team.pids]
    with Client(stage.url) as client:
        before, ours, began = cpu_s(pids), time.process_time(), time.perf_counter()
        client.bulk(SERVICE.name, source, output, column="text", id_column="key")
        seconds, spent = time.perf_counter() - began, time.process_time() - ours
    rounds.add("bulk rate", len(texts) / seconds)
    rounds.add("bulk cpu", 1e3 * (cpu_s(pids) - before + spent) / len(texts))
    rounds.add("client cpu", 1e3 * spent / len(texts))
    return read_output(output, len(texts), (), lambda row, result: True).targets(f"piece {number + 1}")


def run_echo(stage: Stage, rows: int) -> Report:
    """A bulk run on forwards that sleep, beside the time of its full forwards alone: the queue's own part."""
    spec = echo(
        SERVICE.name,
        f"vector:384,sleep:{FORWARD_S:g}",
        batch_size=BATCH,
        max_batch_tokens=100_000,
        max_queue_size=50_000,
    )
    team, rounds = stage.workers(spec, 1), Rounds()
    targets = _bulk(stage, team, rounds, mix(rows), 0)
    forwards = stage.live(spec)[0].forwards
    ideal = BATCH / FORWARD_S
    share = rounds["bulk rate"].median / ideal
    table = Table(
        f"{rows:,} texts, forwards of {FORWARD_S:g} s and {BATCH} rows",
        ["", "texts/s", "CPU ms a text", "of these client.bulk"],
        [
            ["full forwards, one after the other", ideal, "", ""],
            ["bulk run", rounds["bulk rate"], rounds["bulk cpu"], rounds["client cpu"]],
            ["bulk run / full forwards", share, "", ""],
        ],
        f"{forwards} forwards as of the worker's last beat.",
    )
    return Report([table], [at_least("bulk run / full forwards", share, LEAST_RATE), *targets])
