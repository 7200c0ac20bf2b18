"""`millstream config`: checks a configuration, shows it with every default filled in, or publishes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
import yaml

from millstream.broker.config import schema as config_schema
from millstream.broker.config.load import DEFAULT_PATH, Config, ServiceSpec, load, unenforced
from millstream.broker.config.origin import resolved
from millstream.broker.config.url import redacted
from millstream.broker.config.yaml import KeyPath
from millstream.cli.groups import Group
from millstream.cli.options import allow_eviction, json_output
from millstream.cli.table import fit, terminal_width

config_path = click.argument("path", type=click.Path(path_type=Path), default=DEFAULT_PATH)


def load_and_warn(path: Path | None) -> Config:
    """Returns the checked configuration. Warns on stderr, once per key, about settings that are not enforced yet.

    Raises ConfigError if the configuration is invalid.
    """
    loaded = load(path)
    for line in unenforced(loaded):
        click.echo(f"warning: {line}", err=True)
    return loaded


@click.group(cls=Group)
def config() -> None:
    """Check or show a configuration, or publish it for workers and clients."""


@config.command()
@config_path
@json_output(", with every limit of each service")
def check(path: Path, as_json: bool) -> None:
    """Check PATH, by default ./config.yaml, and show each service's main values."""
    loaded = load_and_warn(path)
    services = loaded.services
    if as_json:
        click.echo(json.dumps([_record(service) for service in services.values()], ensure_ascii=False, indent=2))
        return
    if services:
        click.echo(table(services.values(), terminal_width()))
    routes = f", {len(loaded.routes)} {'route' if len(loaded.routes) == 1 else 'routes'}" if loaded.routes else ""
    click.echo(f"{path}: ok, {len(services)} {'service' if len(services) == 1 else 'services'}{routes}")


@config.command()
@config_path
@click.option(
    "--url", metavar="URL", help="The Redis server; by default MILLSTREAM_REDIS_URL, or else redis.url of PATH."
)
@click.option("--replace", is_flag=True, help="Change services that are registered with other values.")
@allow_eviction
def push(path: Path, url: str | None, replace: bool, allow_eviction: bool) -> None:
    """Check PATH, by default ./config.yaml, and publish its services and routes in Redis.

    A route on the server whose weights differ is kept without --replace: it may have been changed while calls go on.
    """
    loaded = load_and_warn(path)
    # Imported here: the Redis client takes 250 ms, and the other commands of this group do not need it.
    from millstream.broker.queue.registry import Registry
    from millstream.broker.queue.routes import Routes
    from millstream.broker.transport import eviction
    from millstream.broker.transport.connection import Connection, find_url
    from millstream.broker.transport.connection import check as check_server

    connection = Connection(find_url(url, loaded, os.environ))
    allow = allow_eviction or eviction.allowed(loaded, os.environ)
    try:
        check_server(connection, allow_eviction=allow)
        changed = Registry(connection, loaded.redis.key_prefix).push(loaded.services.values(), replace=replace)
        routes, differing = Routes(connection, loaded.redis.key_prefix).push(loaded.route_specs, replace)
    finally:
        connection.close()
    for name in changed:
        click.echo(f"{name}: published")
    for name in routes:
        click.echo(f"{name}: route published")
    for name in differing:
        click.echo(route_kept(name))
    if not (changed or routes or differing):
        click.echo("nothing to change")


def route_kept(name: str) -> str:
    """Returns the line for a route that a push did not change."""
    return f"{name}: the server's route differs and is kept; `millstream config push --replace` takes the file's"


@config.command()
@config_path
@click.option("--origin", is_flag=True, help="Show the origin of each value.")
@json_output(": key, value and origin of each")
def show(path: Path, origin: bool, as_json: bool) -> None:
    """Show PATH, by default ./config.yaml, with every default, preset and variable applied.

    The output is a valid configuration. A password is replaced by ***.
    """
    found = [(each.path, _shown(each.path, each.value), each.origin) for each in resolved(load_and_warn(path))]
    if as_json:
        records = [{"key": list(key), "value": value, "origin": source} for key, value, source in found]
        click.echo(json.dumps(records, ensure_ascii=False, indent=2))
        return
    values = [(key, _yaml(value), source) for key, value, source in found]
    width = min(_WIDEST, max((len(line) for line, _ in _lines(values)), default=0))
    for line, source in _lines(values):
        click.echo(f"{line:{width}}  # {source}" if origin and source else line)


@config.command()
def schema() -> None:
    """Print the JSON Schema of config.yaml, for editors.

    Write the schema to a file, and put the line `# yaml-language-server: $schema=PATH` at the top of config.yaml. Then
    an editor completes, explains and checks it.
    """
    click.echo(json.dumps(config_schema.schema(), indent=2))


_WIDEST = 60
"""Widest column of values, in characters: one long value must not move all origins far to the right."""


def _lines(values: Sequence[tuple[KeyPath, str, str]]) -> Iterator[tuple[str, str]]:
    """Yields the lines of the YAML, each with its origin. A line that opens a mapping has an empty origin."""
    above: KeyPath = ()
    for path, text, origin in values:
        known = next(at for at, key in enumerate(path) if above[at : at + 1] != (key,))
        for depth in range(known, len(path) - 1):
            yield f"{'  ' * depth}{_yaml(path[depth])}:", ""
        yield f"{'  ' * (len(path) - 1)}{_yaml(path[-1])}: {text}", origin
        above = path


def _shown(path: KeyPath, value: object) -> object:
    """Returns `value` without a password."""
    return redacted(str(value)) if path in (("redis", "url"), ("telemetry", "otlp_endpoint")) and value else value


def _yaml(value: object) -> str:
    """Returns `value` as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9).removesuffix("...\n").strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def table(services: Iterable[ServiceSpec], width: int | None = None) -> str:
    """Returns a table with the main values of `services`, one line for each, of at most `width` characters."""
    rows: list[tuple[str, ...]] = [
        ("SERVICE", "MODEL", "TYPE", "ROWS", "TOKENS", "WAIT", "WORKERS", "QUEUE", "TIMEOUT")
    ]
    rows += [_row(service) for service in services]
    return fit(rows, width, ("WAIT", "QUEUE", "TOKENS", "ROWS", "TYPE"))


def _record(service: ServiceSpec) -> dict[str, object]:
    names = {"service": service.name, "model": service.model_ref, "type": service.model.type}
    return names | {"runtime": service.runtime.model_dump(mode="json")}


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
