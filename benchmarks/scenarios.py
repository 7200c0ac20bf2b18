"""Runs failures of ordinary use against a real server and real workers: scenarios.py NAME... [--seconds N] [--rows N].

Each scenario prints its figures and whether every target was met. Exit status 1 if one was missed.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import click
from measure import Report, machine, verdicts
from stage import staged


@dataclass(frozen=True, slots=True)
class Scenario:
    """`run` names a module of scenario_lib and its function. `seconds` is the length of its main part by default."""

    run: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Bulk:
    """Scenario of bulk runs: as Scenario, with a number of `rows`. `always`: its server syncs each write."""

    run: str
    rows: int
    always: bool = False


SCENARIOS: Mapping[str, Scenario | Bulk] = {
    "frozen": Scenario("frozen:run", 20.0),
    "crash": Scenario("crash:in_function", 20.0),
    "crash-cost": Scenario("crash:in_cost", 20.0),
    "crash-check": Scenario("crash:in_check", 20.0),
    "slow": Scenario("slow:run", 600.0),
    "waiters": Scenario("waiters:run", 30.0),
    "join": Scenario("join:run", 150.0),
    "join-echo": Scenario("join:run_echo", 60.0),
    "separate": Scenario("separate:run", 120.0),
    "stream": Scenario("stream:run", 60.0),
    "unread": Scenario("unread:run", 60.0),
    "interrupt": Scenario("interrupt:run", 15.0),
    "chat": Scenario("chat:tiny", 45.0),
    "chat-smollm2": Scenario("chat:smollm2", 165.0),
    "tenants": Scenario("tenants:run", 60.0),
    "tenants-claims": Scenario("tenants:claims", 20.0),
    "pool": Scenario("pool:run", 120.0),
    "pool-slow": Scenario("pool_slow:run", 80.0),
    "bulk-beside": Bulk("bulk_beside:run", 5_000),
    "bulk-beside-echo": Bulk("bulk_beside:run_echo", 5_000),
    "bulk-rate-echo": Bulk("bulk_rate:run_echo", 20_000),
    "bulk-rate": Bulk("bulk_rate:run", 20_000),
    "bulk-size": Bulk("bulk_size:run", 1_000_000),
    "bulk-kills": Bulk("bulk_kills:vectors", 6_000, always=True),
    "bulk-kills-texts": Bulk("bulk_kills:texts", 200, always=True),
}


def _load(name: str) -> Callable[..., Report]:
    """Returns the function "module:function". Only what runs is imported: some need torch."""
    module, _, function = name.partition(":")
    found: Callable[..., Report] = getattr(import_module(f"scenario_lib.{module}"), function)
    return found


def play(name: str, seconds: float | None, rows: int | None) -> bool:
    """Run one scenario on a server of its own, and print what it measured; whether every target was met."""
    scenario, began = SCENARIOS[name], time.monotonic()
    with staged("always" if isinstance(scenario, Bulk) and scenario.always else "everysec") as stage:
        if isinstance(scenario, Bulk):
            report = _load(scenario.run)(stage, rows or scenario.rows)
        else:
            report = _load(scenario.run)(stage, seconds or scenario.seconds)
    click.echo("\n\n".join(table.text() for table in [*report.tables, verdicts(report.targets)]))
    passed = all(target.met for target in report.targets)
    click.echo(f"\n{name}: {'PASS' if passed else 'FAIL'} after {time.monotonic() - began:.0f} s\n")
    return passed


@click.command(help=__doc__)
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(SCENARIOS)))
@click.option("--seconds", type=click.FloatRange(min=5.0), help="Length of the main part; by default each one's own.")
@click.option("--rows", type=click.IntRange(min=20), help="Rows of a bulk scenario; by default each one's own.")
def main(names: tuple[str, ...], seconds: float | None, rows: int | None) -> None:
    # Supervisors' and clients' messages about the failures that are provoked here.
    logging.disable(logging.ERROR)
    # Otherwise the server and the workers would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    click.echo("\n".join(f"{name}: {value}" for name, value in machine().items()) + "\n")
    passed = [play(name, seconds, rows) for name in names]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
