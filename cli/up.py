"""`millstream up`: starts a server if none is configured, and workers for every service of a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from millstream.broker.config.data_dir import find_data_dir
from millstream.broker.config.load import Config
from millstream.broker.config.telemetry import LogFormat, LogLevel, TelemetrySettings
from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import ConfigError
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.routes import Routes
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.server.engine import version_text
from millstream.broker.transport import eviction
from millstream.broker.transport.access import secured
from millstream.broker.transport.connection import Connection, check
from millstream.cli import options
from millstream.cli.config import config_path, load_and_warn, route_kept
from millstream.cli.interrupts import Interrupts, interrupt_at_eof
from millstream.cli.server import connect, redis_cli
from millstream.cli.status import status_line
from millstream.cli.supervise import supervise
from millstream.worker.supervision.canary_driver import driving
from millstream.worker.supervision.plan import plans_of, preflight
from millstream.worker.supervision.supervisor import Supervisor
from millstream.worker.supervision.webhook_sender import sending

EOF_DRAIN_S = 2.0
"""Longest drain, in seconds, after the program that started this command has ended."""


@click.command()
@config_path
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the data of the server that is started; by default MILLSTREAM_DATA_DIR, or else redis.data_dir.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Loopback TCP port of the server that is started; 0: any free port.",
)
@click.option(
    "--url", metavar="URL", help="Use this Redis server; by default MILLSTREAM_REDIS_URL, or else redis.url of PATH."
)
@click.option("--replace", is_flag=True, help="Change services that are registered with other values.")
@options.drain_timeout
@options.allow_eviction
@options.log_format
@options.log_level
@click.option("--until-eof", is_flag=True, hidden=True, help="Drain when standard input ends; see client/local.py.")
def up(
    path: Path,
    data_dir: Path | None,
    port: int | None,
    url: str | None,
    replace: bool,
    drain_s: float,
    allow_eviction: bool,
    log_format: LogFormat | None,
    log_level: LogLevel | None,
    until_eof: bool,
) -> None:
    """Start a server if none is configured, and workers for each service of PATH, by default ./config.yaml.

    Ctrl-C drains: workers finish the jobs that they hold, then everything ends. A second Ctrl-C kills.
    """
    if url and (data_dir or port is not None):
        raise click.UsageError("--data-dir and --port are for a server that this command starts: not with --url.")
    config = load_and_warn(path)
    telemetry = options.set_up_logs(config.telemetry, log_format, log_level)
    if not config.services:
        raise ConfigError(f"{path}: nothing to run", hint="add a service under services:")
    preflight(list(config.services.values()))
    own = data_dir is not None or port is not None
    named = None if own else url or os.environ.get(URL_VARIABLE) or config.redis.url
    external = secured(named, config, os.environ) if named else None
    with Interrupts() as interrupts:
        if until_eof:
            interrupt_at_eof(EOF_DRAIN_S)
        with _server(config, external, data_dir, port) as (found, server):
            allow = allow_eviction or eviction.allowed(config, os.environ)
            folder = str(path.resolve().parent)
            stack = Stack(found, server, replace, folder, allow, drain_s, whole=until_eof, telemetry=telemetry)
            _run(config, interrupts, stack)


@dataclass(frozen=True, slots=True)
class Stack:
    """The server of `up` and its options. `server` is the local server, None if `url` is another one.

    `folder` is the folder of the configuration, which may hold the code of custom models. `allow_eviction`: the server
    may delete keys when its memory is full. `drain_s`: longest drain of the workers. `whole`: the command ends if the
    workers of a service cannot start. `telemetry`: logs and traces of the workers.
    """

    url: str
    server: EmbeddedServer | None
    replace: bool
    folder: str
    allow_eviction: bool
    drain_s: float
    whole: bool
    telemetry: TelemetrySettings


def _run(config: Config, interrupts: Interrupts, stack: Stack) -> None:
    prefix, specs = config.redis.key_prefix, list(config.services.values())
    with connect(stack.url) as connection:
        registry = Registry(connection, prefix)
        _introduce(connection, stack, registry.keys(specs[0].name).streams()[1])
        registry.push(specs, replace=stack.replace)
        for name in Routes(connection, prefix).push(config.route_specs, stack.replace)[1]:
            click.echo(route_kept(name))
        plans = plans_of(config, stack.folder)
        variables = stack.telemetry.variables()
        supervisor = Supervisor(stack.url, prefix, plans, drain_s=stack.drain_s, variables=variables)
        names = [spec.name for spec in specs]
        sender, driver = sending(stack.url, prefix, names, config.webhooks), driving(stack.url, prefix, names)
        with sender, driver, status_line(connection.safe_url) as status:
            inspector = Inspector(connection, prefix)
            supervise(supervisor, interrupts, status, inspector, stack.server, whole=stack.whole)
    click.echo("drained: jobs that no worker had claimed wait in the queue")


@contextmanager
def _server(
    config: Config, external: str | None, data_dir: Path | None, port: int | None
) -> Iterator[tuple[str, EmbeddedServer | None]]:
    """Yields the URL to use, and the local server that is started if there is no `external` URL."""
    if external:
        yield external, None
        return
    durability = config.redis.durability
    if durability == "replicated":
        raise ConfigError(
            "redis.durability is replicated, and the server that `millstream up` starts has no replicas",
            hint="set redis.url to a server that has replicas, or set durability: always",
        )
    folder = find_data_dir(data_dir, config, os.environ)
    with EmbeddedServer.start(folder, tcp_port=port, appendfsync=durability) as server:
        yield server.url, server


def _introduce(connection: Connection, stack: Stack, stream: str) -> None:
    """Checks the server and prints its address. Raises ConfigError if it cannot be used, BrokerUnavailable."""
    info, server = check(connection, allow_eviction=stack.allow_eviction), stack.server
    where = ""
    if server:
        where = f"; data in {server.data_dir}" if server.owned else f"; already running, data in {server.data_dir}"
    click.echo(f"server: {connection.safe_url} ({info.engine} {version_text(info.version)}{where})")
    click.echo(f"look:   {redis_cli(connection.url, 'XRANGE', stream, '-', '+', 'COUNT', '10')}")
    for reachable in [connection.safe_url, server.tcp_url if server else None]:
        if reachable:
            click.echo(f"use:    export {URL_VARIABLE}={reachable}")
