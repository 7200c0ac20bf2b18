"""A bulk run of many short rows on an echo service: the memory of its process does not grow with the input."""

from __future__ import annotations

from corpus import payloads
from measure import Cell, Report, Table, Target
from stage import Stage, echo

from scenario_lib.bulk import Cost, Run, read_output, write_input
from scenario_lib.calls import at_most

SERVICE = echo("bulk", batch_size=256, max_batch_tokens=200_000, max_queue_size=10_000)
LENGTH = 24
FEWER = 10
"""The reference is a run of one row in so many."""

MOST_RSS = 1.1
"""Memory of the run of all rows over that of the reference."""


def run(stage: Stage, rows: int) -> Report:
    stage.workers(SERVICE, 1)
    few, all_rows = (_run(stage, count) for count in (max(1, rows // FEWER), rows))
    heading = ["rows", "most memory, MB", "seconds", "rows/s", "CPU us a row, bulk process"]
    memory = at_most(f"memory of {rows:,} rows / of {rows // FEWER:,}", all_rows[1].rss / few[1].rss, MOST_RSS)
    targets = [memory, *few[2], *all_rows[2]]
    return Report([Table("Short rows on an echo service", heading, [few[0], all_rows[0]])], targets)


def _run(stage: Stage, count: int) -> tuple[list[Cell], Cost, list[Target]]:
    source, texts = stage.home / f"{count}.jsonl", payloads(count, LENGTH)
    write_input(source, texts)
    bulk = Run(stage, SERVICE.name, source, stage.home / f"out-{count}")
    cost = bulk.complete()
    verdict = read_output(bulk.output, count, (), lambda row, result: result == texts[row])
    row: list[Cell] = [count, cost.rss / 1e6, cost.seconds, count / cost.seconds, 1e6 * cost.cpu / count]
    return row, cost, verdict.targets(f"{count:,} rows")
