"""A run as text: what it was, what was harmed, what held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from chaos_lib.lanes import Record
from chaos_lib.verdict import Finding
from millstream.cli.table import align


def table(heading: Mapping[str, str], records: Mapping[str, Record], findings: Sequence[Finding]) -> str:
    facts = [f"{name}: {value}" for name, value in heading.items()]
    rows = [("FAULT", "LANDED", "MISSED", "RECOVERY MEDIAN", "MAX"), *map(_row, records, records.values())]
    misses = [f"missed: {name}: {why}" for name, record in records.items() for why in _counted(record.missed)]
    broken = sum(not finding.holds for finding in findings)
    verdict = f"{broken} of {len(findings)} invariants VIOLATED" if broken else f"all {len(findings)} invariants hold"
    return "\n".join([*facts, "", align(rows), *misses, "", *map(str, findings), "", verdict])


def _row(name: str, record: Record) -> tuple[str, ...]:
    recovery = record.recovery()
    times = [f"{seconds:.2f} s" for seconds in recovery] if recovery else ["-", "-"]
    return name, str(len(record.landed)), str(len(record.missed)), *times


def _counted(reasons: Sequence[str]) -> list[str]:
    return [f"{why} ({count})" for why, count in Counter(reasons).items()]
