"""`millstream worker`: runs workers for the services of a server, or lists them. They need only the server's URL."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.pools import Pool
from millstream.broker.config.telemetry import LogFormat, LogLevel
from millstream.broker.config.webhooks import WebhookSettings
from millstream.broker.contract.errors import ConfigError, UnknownService
from millstream.broker.contract.operations import RUNNABLE, types_with
from millstream.broker.queue.figure_text import memory
from millstream.broker.queue.inspector import Inspector, ServiceView, WorkerView
from millstream.broker.queue.registry import Registry
from millstream.broker.target import find_config, find_telemetry
from millstream.broker.transport.connection import check
from millstream.cli import drain_workers, options
from millstream.cli.groups import Group
from millstream.cli.interrupts import Interrupts
from millstream.cli.server import connect, find_server
from millstream.cli.status import Lines
from millstream.cli.table import age, cut, escape, fit, number, terminal_width

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
    "MEMORY",
    "LOADS/MIN",
    "AGE",
    "PAST",
)
_SPARE = (
    "PAST",
    "READS",
    "THREADS",
    "LOADS/MIN",
    "TOKENS",
    "PADDING",
    "MEMORY",
    "JOBS",
    "PID",
    "HOST",
    "TEXTS/S",
    "AGE",
    "BUSY",
    "RUNNING",
    "DEVICE",
)
"""Columns that a narrow terminal leaves out, the first one first. The name of a worker begins with its host."""


@click.group(cls=Group)
def worker() -> None:
    """Run workers for the services of a server, list the live ones, or empty a host."""


for command in (drain_workers.drain, drain_workers.stop, drain_workers.start):
    worker.add_command(command)


@worker.command()
@options.services
@options.url
@options.prefix
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; by default the model's.")
@click.option("--pool", metavar="POOL", help="A pool of ./config.yaml, instead of services.")
@click.option("--count", type=click.IntRange(min=1), help="Processes of each service; by default its worker_count.")
@options.drain_timeout
@options.allow_eviction
@options.log_format
@options.log_level
def run(
    services: tuple[str, ...],
    url: str | None,
    prefix: str | None,
    device: str | None,
    pool: str | None,
    count: int | None,
    drain_s: float,
    allow_eviction: bool,
    log_format: LogFormat | None,
    log_level: LogLevel | None,
) -> None:
    """Run workers for each SERVICE, by default for all services that can run here, or those of a pool.

    The services are read from the server. Only the code of custom models is not: ./config.yaml names it. Ctrl-C drains:
    workers finish the jobs that they hold. A second Ctrl-C kills.
    """
    # Imported here: these take 50 ms, and `worker ls` does not need them.
    from millstream.cli.supervise import supervise
    from millstream.worker.supervision.canary_driver import driving
    from millstream.worker.supervision.plan import Plan, pool_plan, preflight
    from millstream.worker.supervision.supervisor import Supervisor
    from millstream.worker.supervision.webhook_sender import sending

    if pool and (services or device or count):
        raise click.UsageError("--pool names services, device and processes: leave SERVICE, --device and --count out.")
    own_pool = _find_pool(pool) if pool else None
    telemetry = options.set_up_logs(find_telemetry(os.environ), log_format, log_level)
    target = find_server(url, prefix)
    with Interrupts() as interrupts:
        with connect(target.url) as connection:
            check(connection, allow_eviction=allow_eviction or target.allow_eviction)
            chosen = own_pool.services if own_pool else services
            specs = _choose(Registry(connection, target.prefix), chosen, connection.safe_url)
        preflight(specs)
        folder = str(Path.cwd())
        if pool and own_pool:
            plans = [pool_plan(pool, own_pool, {spec.name: spec for spec in specs}, folder)]
        else:
            plans = [Plan(spec, count or spec.runtime.worker_count, device, folder) for spec in specs]
        supervisor = Supervisor(target.url, target.prefix, plans, drain_s=drain_s, variables=telemetry.variables())
        names = [spec.name for spec in specs]
        sender = sending(target.url, target.prefix, names, _own_webhooks())
        with sender, driving(target.url, target.prefix, names):
            supervise(supervisor, interrupts, Lines())
    click.echo("drained: jobs that no worker had claimed wait in the queue")


@worker.command("ls")
@options.url
@options.prefix
@options.json_output(", with all figures of each worker")
def list_workers(url: str | None, prefix: str | None, as_json: bool) -> None:
    """List the live workers of all services, with the figures of their last heartbeat.

    RUNNING is the number of jobs in the current forward, and its age. TEXTS/S and BUSY are averages over the worker's
    life. TOKENS is the most padded tokens of a forward; if max_batch_tokens is auto, the worker measured it. READS is
    the most tokens of a text that the model could read at start. THREADS is the CPU threads of a forward. MEMORY is
    what the model of a pool takes, and LOADS/MIN how often it was loaded in the last minute; STATE says whether
    it is in memory (ready), on standby, being loaded or being evicted. PAST is how the previous worker in this place
    ended.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        views = Inspector(connection, target.prefix).services()
        where = connection.safe_url
    found = [(view.name, each) for view in views for each in sorted(view.workers, key=_place)]
    if as_json:
        click.echo(json.dumps([_record(name, each) for name, each in found], ensure_ascii=False, indent=2))
    elif found:
        click.echo(fit([_HEADING, *(_row(name, each) for name, each in found)], terminal_width(), _SPARE))
    else:
        click.echo(f"no worker is alive on {where}")
    if not as_json:
        for line in kept_empty(views):
            click.echo(cut(line, terminal_width()))


def kept_empty(views: Sequence[ServiceView]) -> list[str]:
    """Returns a line for each worker or host that an operator keeps empty."""
    services: dict[str, list[str]] = {}
    for view in views:
        for name in view.drained:
            services.setdefault(name, []).append(view.name)
    return [
        f"kept empty by an operator: {escape(name)} ({', '.join(found)}); millstream worker start {escape(name)}"
        for name, found in sorted(services.items())
    ]


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
        memory(each.memory),
        str(each.loads_minute) if each.memory else "-",
        age(each.age_ms or None),
        # The text may quote an exception that has several lines.
        escape(" ".join(each.past.split())) or "-",
    )


def _choose(registry: Registry, services: Sequence[str], where: str) -> list[ServiceSpec]:
    """Returns the named services, each once, or all that can run here, with their code.

    Raises UnknownService if one is not registered, or if none is named and none can run here.
    """
    names = list(dict.fromkeys(services)) if services else registry.names()
    registered = _with_own_settings([registry.read(name) for name in names])
    if services:
        return registered
    runnable = [spec for spec in registered if spec.model.operation.runs and _has_code(spec)]
    if not runnable:
        code = types_with(lambda each: each.needs_code)
        types = f"types that can run: {', '.join(RUNNABLE)}; {code} if ./config.yaml names a handler"
        hint = types if registered else "run `millstream config push`"
        raise UnknownService(f"no service on {where} that a worker could run", hint=hint)
    return runnable


def _with_own_settings(specs: Sequence[ServiceSpec]) -> list[ServiceSpec]:
    """Returns `specs` with what only this host's own config.yaml says: handlers, and the places of servers' keys.

    Raises ConfigError if that file is invalid.
    """
    needed = any(spec.model.operation.needs_code or spec.model.is_upstream for spec in specs)
    config = find_config(os.environ) if needed else None
    own = config.services if config else {}
    return [
        spec.with_handler(own[spec.name].model.handler).with_key(own[spec.name].model) if spec.name in own else spec
        for spec in specs
    ]


def _find_pool(name: str) -> Pool:
    """Returns the pool of this host's own config.yaml. Raises ConfigError if it has none of that name."""
    config = find_config(os.environ)
    pools = config.pools if config else {}
    if name not in pools:
        known = f"known are: {', '.join(pools)}" if pools else "add it under pools:"
        raise ConfigError(f"./config.yaml has no pool named {name}", hint=known)
    return pools[name]


def _own_webhooks() -> WebhookSettings:
    """Returns what this host's own config.yaml says of webhooks. Raises ConfigError if that file is invalid."""
    config = find_config(os.environ)
    return config.webhooks if config else WebhookSettings()


def _has_code(spec: ServiceSpec) -> bool:
    return not spec.model.operation.needs_code or spec.model.handler is not None
