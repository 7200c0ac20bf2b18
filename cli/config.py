"""`millstream config`: check a configuration, or publish it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from millstream.broker.config import DEFAULT_PATH, Config, ServiceSpec, load, unenforced
from millstream.cli.table import aligned

config_path = click.argument("path", type=click.Path(path_type=Path), default=DEFAULT_PATH)


def load_and_warn(path: Path | None) -> Config:
    """The checked configuration; what it asks for that is not enforced yet goes to stderr, once a key."""
    loaded = load(path)
    for line in unenforced(loaded):
        click.echo(f"warning: {line}", err=True)
    return loaded


@click.group()
def config() -> None:
    """Check a configuration, or publish it for workers and clients."""


@config.command()
@config_path
def check(path: Path) -> None:
    """Check PATH, by default ./config.yaml, and show each service's main values."""
    services = load_and_warn(path).services
    if services:
        click.echo(table(services.values()))
    click.echo(f"{path}: ok, {len(services)} {'service' if len(services) == 1 else 'services'}")


@config.command()
@config_path
@click.option(
    "--url", metavar="URL", help="The Redis server; by default MILLSTREAM_REDIS_URL, or else redis.url of PATH."
)
@click.option("--replace", is_flag=True, help="Change services that are registered with other values.")
def push(path: Path, url: str | None, replace: bool) -> None:
    """Check PATH, by default ./config.yaml, and publish its services in Redis."""
    loaded = load_and_warn(path)
    # The Redis client takes as long to import as all the rest; `check` does without.
    from millstream.broker.connection import Connection, find_url
    from millstream.broker.registry import Registry

    connection = Connection(find_url(url, loaded, os.environ))
    try:
        changed = Registry(connection, loaded.redis.key_prefix).push(loaded.services.values(), replace=replace)
    finally:
        connection.close()
    for name in changed:
        click.echo(f"{name}: published")
    if not changed:
        click.echo("nothing to change")


def table(services: Iterable[ServiceSpec]) -> str:
    """The main values of `services`, a line each under a heading."""
    rows: list[tuple[str, ...]] = [
        ("SERVICE", "MODEL", "TYPE", "ROWS", "TOKENS", "WAIT", "WORKERS", "QUEUE", "TIMEOUT")
    ]
    rows += [_row(service) for service in services]
    return aligned(rows)


def _row(service: ServiceSpec) -> tuple[str, ...]:
    runtime = service.runtime
    return (
        service.name,
        service.model_ref,
        service.model.type,
        str(runtime.batch_size),
        str(runtime.max_batch_tokens),
        _seconds(runtime.batch_timeout),
        str(runtime.worker_count),
        str(runtime.max_queue_size),
        _seconds(runtime.total_timeout),
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value * 1000:g}ms" if 0 < value < 1 else f"{value:g}s"
