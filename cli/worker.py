"""`millstream worker`: workers for the services of a server; its URL is all they need."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from millstream.cli import options
from millstream.cli.table import age, aligned, harmless, number

if TYPE_CHECKING:
    from millstream.broker.config.load import ServiceSpec
    from millstream.broker.queue.inspector import WorkerView
    from millstream.broker.queue.registry import Registry

_HEADING = (
    "SERVICE",
    "CONSUMER",
    "HOST",
    "PID",
    "DEVICE",
    "STATE",
    "RUNNING",
    "JOBS",
    "TEXTS/S",
    "BUSY",
    "PADDING",
    "TOKENS",
    "READS",
    "THREADS",
    "AGE",
    "PAST",
)


@click.group()
def worker() -> None:
    """Run workers for the services of a server, or list those that run."""


@worker.command()
@click.argument("services", metavar="[SERVICE]...", nargs=-1)
@options.url
@options.prefix
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; by default the model's.")
@click.option("--count", type=click.IntRange(min=1), help="Processes of each service; by default its worker_count.")
@options.allow_eviction
def run(
    services: tuple[str, ...],
    url: str | None,
    prefix: str | None,
    device: str | None,
    count: int | None,
    allow_eviction: bool,
) -> None:
    """Run workers for each SERVICE, by default for all that can run here.

    What they run is read from the server, but for the code of custom models, which ./config.yaml names. Ctrl-C drains:
    workers finish what they hold. Ctrl-C again kills.
    """
    target = options.find(url, prefix)
    from millstream.broker.queue.registry import Registry
    from millstream.broker.transport.connection import check
    from millstream.cli.interrupts import Interrupts
    from millstream.cli.status import Lines
    from millstream.cli.supervise import supervise
    from millstream.worker.supervision.supervisor import Plan, Supervisor, preflight

    with Interrupts() as interrupts:
        with options.connected(target.url) as connection:
            check(connection, allow_eviction=allow_eviction or target.allow_eviction)
            specs = _chosen(Registry(connection, target.prefix), services, connection.safe_url)
        preflight(specs)
        folder = str(Path.cwd())
        plans = [Plan(spec, count or spec.runtime.worker_count, device, folder) for spec in specs]
        supervisor = Supervisor(target.url, target.prefix, plans)
        supervise(supervisor, interrupts, Lines())
    click.echo("drained: what no worker had claimed waits in the queue")


@worker.command("ls")
@options.url
@options.prefix
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all of each worker's figures.")
def list_workers(url: str | None, prefix: str | None, as_json: bool) -> None:
    """List the live workers of all services, as each said at its last beat.

    RUNNING is the jobs in the forward under way, and for how long. TEXTS/S and BUSY are over the worker's life. TOKENS
    is the most padded tokens of a forward, as measured where max_batch_tokens is auto. READS is the most tokens of a
    text, as its model proved at start, THREADS the CPU threads of a forward. PAST is how the worker before it in its
    place ended.
    """
    target = options.find(url, prefix)
    from millstream.broker.queue.inspector import Inspector

    with options.connected(target.url) as connection:
        views = Inspector(connection, target.prefix).services()
        where = connection.safe_url
    found = [(view.name, each) for view in views for each in sorted(view.workers, key=_place)]
    if as_json:
        click.echo(json.dumps([_record(name, each) for name, each in found], ensure_ascii=False, indent=2))
    elif found:
        click.echo(aligned([_HEADING, *(_row(name, each) for name, each in found)]))
    else:
        click.echo(f"no worker is alive on {where}")


def _place(each: WorkerView) -> tuple[str, int, str]:
    return each.host, each.pid, each.consumer


def _record(service: str, each: WorkerView) -> dict[str, object]:
    figures = {"rows_per_s": each.rows_per_s, "busy": each.busy, "padding": each.padding}
    return {"service": service} | asdict(each) | figures


def _row(service: str, each: WorkerView) -> tuple[str, ...]:
    return (
        service,
        each.consumer,
        each.host or "-",
        str(each.pid or "-"),
        each.device or "-",
        each.state,
        f"{each.running} for {age(each.running_ms)}" if each.running else "-",
        str(each.jobs),
        number(each.rows_per_s, 1),
        "-" if each.busy is None else f"{each.busy:.0%}",
        number(each.padding, 2),
        str(each.batch_tokens or "-"),
        str(each.text_tokens or "-"),
        str(each.threads or "-"),
        age(each.age_ms or None),
        # It may quote an exception, of several lines.
        harmless(" ".join(each.past.split())) or "-",
    )


def _chosen(registry: Registry, services: Sequence[str], where: str) -> list[ServiceSpec]:
    """The named services, each once, or all that can run here, with their code. Raises UnknownService."""
    from millstream.broker.contract.errors import UnknownService
    from millstream.worker.supervision.supervisor import RUNNABLE

    names = list(dict.fromkeys(services)) if services else registry.names()
    registered = _with_handlers([registry.read(name) for name in names])
    if services:
        return registered
    runnable = [spec for spec in registered if spec.model.type in RUNNABLE and _has_code(spec)]
    if not runnable:
        types = f"types that run today: {', '.join(RUNNABLE)}; custom where ./config.yaml names a handler"
        hint = types if registered else "run `millstream config push`"
        raise UnknownService(f"no service on {where} that a worker could run", hint=hint)
    return runnable


def _with_handlers(specs: Sequence[ServiceSpec]) -> list[ServiceSpec]:
    """The same, custom ones with the code that this host's own file names, if it does. Raises ConfigError."""
    from millstream.broker.target import find_config

    needed = any(spec.model.type == "custom" for spec in specs)
    config = find_config(os.environ) if needed else None
    own = config.services if config else {}
    return [spec.with_handler(own[spec.name].model.handler) if spec.name in own else spec for spec in specs]


def _has_code(spec: ServiceSpec) -> bool:
    return spec.model.type != "custom" or spec.model.handler is not None
