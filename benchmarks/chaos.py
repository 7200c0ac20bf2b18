"""Faults by a seed against a real millstream, and a ledger outside the product: chaos.py --seconds 60 --seed 7.

Prints what was harmed and whether every invariant held; exit status 0 where all did, 1 where one was violated.
"""

from __future__ import annotations

import json
import logging
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import click
import redis
from chaos_lib import faults
from chaos_lib.grounds import Shape
from chaos_lib.lanes import Lane, Record, drive
from chaos_lib.ledger import CANCELLED, OK
from chaos_lib.ordered import Harm
from chaos_lib.report import table
from chaos_lib.site import CALLERS, WORKERS, Site, opened
from chaos_lib.verdict import (
    Evidence,
    Finding,
    State,
    answered_again,
    innocents_buried,
    judge,
    lost_by_the_server,
    ordered_costs,
)
from support import eventually

from millstream.broker.contract.errors import Cancelled, MillstreamError
from millstream.broker.server.datadir import AppendFsync
from millstream.client import Client

RARE = {"server frozen 15 s": 1}
OFTEN = {"server killed": 6, "server frozen 0.2-2 s": 6, "SCRIPT FLUSH": 6, "CLIENT KILL": 6}
NETWORK = Lane(faults.NETWORK, 3.0)
OUTAGES = [Lane(faults.OUTAGES, 0.5), NETWORK]
DEATHS = [
    Lane(faults.WORKERS_KILLED, 6.0),
    Lane(faults.WORKERS_FROZEN, 1.0),
    Lane(faults.WORKERS_FROZEN, 1.0),
    Lane(faults.SUPERVISORS, 1.0),
    Lane(faults.CLIENTS, 8.0),
    Lane(faults.POISONS, 8.0),
]
PHASES: Mapping[Shape, tuple[list[Lane], list[Lane]]] = {
    "single": (OUTAGES, [Lane(faults.OUTAGES, 3.0, OFTEN | RARE), NETWORK, *DEATHS]),
    "sentinel": ([Lane(faults.MASTERS, 4.0)], [Lane(faults.MASTERS, 8.0), *DEATHS]),
    "cluster": ([Lane(faults.SLOTS, 2.0)], [Lane(faults.SLOTS, 4.0), *DEATHS]),
}
"""What fails at first, which is no worker's fault, and what fails then, beside the forced drains."""

DRAINS_GAP_S = 20.0

OUTAGES_SHARE, OUTAGES_LEAST_S = 0.15, 28.0
CALLS_A_SECOND = 250
FORGOTTEN = "whose reply the new master did not know of"
DRAIN_S = 60.0
FOUND_S = 20.0


@dataclass(frozen=True)
class Plan:
    seconds: float
    seed: int
    calls_a_second: float
    fsync: AppendFsync
    shape: Shape = "single"
    drain_every_s: float | None = None
    fair: bool = False

    @property
    def phases(self) -> tuple[list[Lane], list[Lane]]:
        """What fails at first, which is no worker's fault, and what fails then."""
        first, then = PHASES[self.shape]
        every_s = self.drain_every_s
        drains = Lane(faults.DRAINS, DRAINS_GAP_S if every_s is None else every_s, least_gap_s=every_s or 0.0)
        return first, [*then, drains]

    @property
    def outages_s(self) -> float:
        """How long nothing but the server and the network fails."""
        return min(self.seconds / 2, max(OUTAGES_LEAST_S, OUTAGES_SHARE * self.seconds))


@dataclass(frozen=True)
class Result:
    """What a run shows."""

    heading: Mapping[str, str]
    records: Mapping[str, Record]
    findings: list[Finding]

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def to_json(self) -> str:
        kinds = {
            name: {"landed": len(record.landed), "recovery": record.recovery(), "missed": record.missed}
            for name, record in self.records.items()
        }
        found = [asdict(finding) | {"holds": finding.holds} for finding in self.findings]
        return json.dumps({"run": dict(self.heading), "faults": kinds, "invariants": found}, indent=2)


def run(plan: Plan, home: Path) -> Result:
    """One run from the first process to the verdict."""
    first, then = plan.phases
    with opened(home, plan.shape, plan.fsync, CALLERS / plan.calls_a_second, fair=plan.fair) as site:
        began = time.monotonic()
        records: dict[str, Record] = {}
        drive(first, site, f"{plan.seed}-outages", plan.outages_s, records)
        quiet_until = site.now_ms()
        drive(then, site, f"{plan.seed}-all", plan.seconds - plan.outages_s, records)
        lasted_s = time.monotonic() - began
        drained_s = drain(site)
        evidence = gather(site, plan, quiet_until, records)
        findings = judge(evidence, site.keys)
        return Result(heading(site, plan, evidence, (lasted_s, drained_s)), records, findings)


def drain(site: Site) -> float:
    """Heal, let every caller end, and wait until the site is as it was before; seconds it took."""
    began = time.monotonic()
    site.heal()
    site.finish_calls()
    # What is not so in time is a violation, and the verdict names it.
    with suppress(AssertionError):
        eventually(lambda: is_whole(site), within_s=DRAIN_S)
    return time.monotonic() - began


def is_whole(site: Site) -> bool:
    live = site.watch.live().keys()
    return (
        len(live) == WORKERS
        and site.watch.depth() == 0
        and all(site.poison_replies().values())
        and site.consumers() - {"returned"} == live
    )


def gather(site: Site, plan: Plan, quiet_until: int, records: Mapping[str, Record]) -> Evidence:
    accounts = [calling.account() for calling in site.over]
    orphaned = [where for account in accounts if account.killed for where in account.accepted.values() if ":" in where]
    return Evidence(
        accounts=accounts,
        journal=site.ground.journal(site.keys),
        poison=site.poison_replies(),
        found=fetched(site, orphaned),
        quiet_until=quiet_until,
        state=state_of(site),
        workers=WORKERS,
        synced=plan.fsync == "always" and plan.shape != "sentinel",
        forgets=plan.shape == "sentinel",
        problems=[*site.problems, *(f"{name}: {text}" for name, text in site.complaints().items())],
        landed={name: len(record.landed) for name, record in records.items()},
        ordered=site.ordered,
        harms=[Harm(name, *span) for name, record in records.items() for span in record.spans],
    )


def state_of(site: Site) -> State:
    return State(
        depth=site.watch.depth(),
        pending=len(site.watch.held()),
        dead=[letter[b"id"].decode() for letter in site.watch.dead_letters()],
        consumers=site.consumers(),
        live=site.watch.live().keys(),
        keys=site.immortal_keys(),
    )


def fetched(site: Site, calls: list[str]) -> dict[str, str]:
    """What any process can still learn of detached calls whose callers were killed."""
    with Client(site.ground.url) as client:
        return {call: outcome_of(client, call) for call in calls}


def outcome_of(client: Client, call: str) -> str:
    try:
        outcomes = client.job(call).outcomes(timeout=FOUND_S)
    except MillstreamError as error:
        return f"{type(error).__name__}: {error}"
    errors = [outcome for outcome in outcomes if isinstance(outcome, MillstreamError)]
    strange = [error for error in errors if not isinstance(error, Cancelled)]
    return str(strange[0]) if strange else CANCELLED if errors else OK


def heading(site: Site, plan: Plan, evidence: Evidence, took: tuple[float, float]) -> dict[str, str]:
    lasted_s, drained_s = took
    lost, held = len(lost_by_the_server(evidence)), ordered_costs(evidence)
    later = sum(cost.charged_later for _, cost in held)
    return {
        "seed": str(plan.seed),
        "tenants": "share the claims" if plan.fair else "are not told apart",
        "versions": f"python {platform.python_version()}, redis-py {redis.__version__}, {site.ground.version}",
        "fsync": plan.fsync if plan.shape == "single" else "everysec",
        "duration": f"{lasted_s:.0f} s of faults ({plan.outages_s:.0f} s of outages alone), {drained_s:.1f} s of drain",
        "jobs": f"{site.ended_jobs()} ended",
        "calls": f"{sum(len(each.sent) for each in evidence.accounts)} of {len(evidence.accounts)} processes",
        "acknowledged and lost by the server": str(lost),
        "answered again": f"{len(answered_again(evidence))}, {FORGOTTEN}" if evidence.forgets else "none but below",
        "innocents buried": str(len(innocents_buried(evidence))),
        "held at ordered ends": f"{len(held)}, of which {later} were charged for the death of a later worker",
        "most attempts of a job": f"{evidence.journal.most_attempts:g}" if evidence.journal else "not known",
    }


@click.command(help=__doc__)
@click.option("--seconds", default=60.0, help="How long faults fall; the drain comes on top.")
@click.option("--seed", default=7, help="Which faults, in which order, against whom.")
@click.option("--jobs", type=int, help=f"About how many calls to make in all; {CALLS_A_SECOND} a second if not given.")
@click.option("--fsync", type=click.Choice(["always", "everysec"]), default="always")
@click.option(
    "--topology",
    type=click.Choice(get_args(Shape)),
    default="single",
    help="One server behind proxies; a replicated master that is killed; a Cluster whose slots move.",
)
@click.option(
    "--drain-every",
    type=click.FloatRange(min=1.0),
    help=f"Seconds from one forced drain to the next; up to {DRAINS_GAP_S:g} by the seed if not given.",
)
@click.option("--fair", is_flag=True, help="Tenants share the claims, and have a limit of jobs in flight.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write it all there, too.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Run in this new folder, and keep it.")
def main(
    seconds: float,
    seed: int,
    jobs: int | None,
    fsync: AppendFsync,
    topology: Shape,
    drain_every: float | None,
    fair: bool,
    json_file: Path | None,
    keep: Path | None,
) -> None:
    # What supervisors and proxies say while all falls apart is no news here.
    logging.disable(logging.ERROR)
    # As Ctrl-C does: what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = Plan(seconds, seed, (jobs / seconds) if jobs else CALLS_A_SECOND, fsync, topology, drain_every, fair)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        if keep:
            keep.mkdir(parents=True)
        result = run(plan, keep.resolve() if keep else Path(folder))
    click.echo(table(result.heading, result.records, result.findings))
    if json_file:
        json_file.write_text(result.to_json(), encoding="utf-8")
    sys.exit(0 if result.holds else 1)


if __name__ == "__main__":
    main()
