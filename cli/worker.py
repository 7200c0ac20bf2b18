"""`millstream worker`: workers for the services of a server; its URL is all they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from millstream.cli import options

if TYPE_CHECKING:
    from millstream.broker.config import ServiceSpec
    from millstream.broker.registry import Registry


@click.group()
def worker() -> None:
    """Run workers for the services of a server."""


@worker.command()
@click.argument("services", metavar="[SERVICE]...", nargs=-1)
@options.url
@options.prefix
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; by default the model's.")
@click.option("--count", type=click.IntRange(min=1), help="Processes of each service; by default its worker_count.")
def run(services: tuple[str, ...], url: str | None, prefix: str | None, device: str | None, count: int | None) -> None:
    """Run workers for each SERVICE, by default for all that can run here.

    What they run is read from the server. Ctrl-C drains: workers finish what they hold. Ctrl-C again kills.
    """
    target = options.find(url, prefix)
    from millstream.broker.connection import check
    from millstream.broker.registry import Registry
    from millstream.cli.interrupts import Interrupts
    from millstream.cli.status import Lines
    from millstream.cli.supervise import supervise
    from millstream.worker.supervisor import Plan, Supervisor, preflight

    with Interrupts() as interrupts:
        with options.connected(target.url) as connection:
            check(connection)
            specs = _chosen(Registry(connection, target.prefix), services, connection.safe_url)
        preflight(specs)
        plans = [Plan(spec, count or spec.runtime.worker_count, device) for spec in specs]
        supervisor = Supervisor(target.url, target.prefix, plans)
        supervise(supervisor, interrupts, Lines())
    click.echo("drained: what no worker had claimed waits in the queue")


def _chosen(registry: Registry, services: Sequence[str], where: str) -> list[ServiceSpec]:
    """The named services, each once, or all with a worker in this version. Raises UnknownService."""
    from millstream.broker.errors import UnknownService
    from millstream.worker.supervisor import RUNNABLE

    if services:
        return [registry.read(name) for name in dict.fromkeys(services)]
    registered = [registry.read(name) for name in registry.names()]
    runnable = [spec for spec in registered if spec.model.type in RUNNABLE]
    if not runnable:
        hint = "run `millstream config push`" if not registered else f"types that run today: {', '.join(RUNNABLE)}"
        raise UnknownService(f"no service on {where} that a worker could run", hint=hint)
    return runnable
