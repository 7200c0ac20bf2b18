"""Options that several commands share, the search for the server, and redis-cli lines for its URL."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import click

from millstream.broker.config.units import seconds
from millstream.broker.contract.errors import InvalidRequest

if TYPE_CHECKING:
    from millstream.broker.contract.keys import ServiceKeys
    from millstream.broker.target import Target
    from millstream.broker.transport.connection import Connection

url = click.option(
    "--url",
    metavar="URL",
    help="The Redis server; by default MILLSTREAM_REDIS_URL, redis.url of ./config.yaml, or a local `millstream up`.",
)
prefix = click.option(
    "--prefix", metavar="PREFIX", help="Start of every key; by default redis.key_prefix of ./config.yaml, or else ms."
)

allow_eviction = click.option(
    "--allow-eviction", is_flag=True, help="Use a server that deletes keys when its memory is full: jobs may be lost."
)

service = click.argument("service")
yes = click.option("--yes", is_flag=True, help="Do not ask.")


def duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Returns the seconds of an option such as 500ms, 10s, 5m or 2h, for `callback=`.

    Raises BadParameter if the value is no duration or is 0.
    """
    if value is None:
        return None
    try:
        parsed = seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not parsed:
        raise click.BadParameter("must be above 0")
    return parsed


def find(url: str | None, prefix: str | None) -> Target:
    """Returns the target that `Client` would use. Raises ConfigError, or BrokerUnavailable if no server is named."""
    # Importing the Redis client takes as long as all other imports, and --help does not need it.
    from millstream.broker.target import find_target

    return find_target(url, prefix, os.environ)


@contextmanager
def connect(url: str) -> Iterator[Connection]:
    """Opens a connection for one command, and closes it at the end."""
    from millstream.broker.transport.connection import Connection

    connection = Connection(url, name="millstream-cli")
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def open_service(service: str, url: str | None, prefix: str | None) -> Iterator[tuple[Connection, ServiceKeys]]:
    """Opens a connection for one command to a registered service. Yields the connection and the service's keys.

    Raises UnknownService, ConfigError, BrokerUnavailable. In its block the library's errors are raised as ours.
    """
    target = find(url, prefix)
    from millstream.broker.queue.registry import Registry
    from millstream.broker.transport.connection import translated

    with connect(target.url) as connection, translated(connection.safe_url):
        registry = Registry(connection, target.prefix)
        # Raises UnknownService with a list of the registered services.
        registry.read(service)
        yield connection, registry.keys(service)


def confirm(question: str, yes: bool) -> None:
    """Asks on the terminal, unless `yes`. Raises InvalidRequest if there is no terminal, Abort if the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(question, hint="there is no terminal to answer on: say --yes")
    click.confirm(question, abort=True)


def redis_cli(url: str, *words: str) -> str:
    """Returns the shell line that runs `words` in redis-cli on the server of `url`, with *** for a password.

    For a master under Sentinel the host in the line is MASTER, because the master may change.
    """
    from millstream.broker.config.url import read_url, redacted
    from millstream.broker.transport.access import without_password_file

    url = without_password_file(url)
    place, parts = read_url(url), urlsplit(url)
    if place.kind == "cluster":
        return shlex.join(["redis-cli", "-c", "-u", redacted(place.node_url(place.addresses[0])), *words])
    if place.kind == "sentinel":
        return shlex.join(["redis-cli", "-u", redacted(place.node_url(("MASTER", 6379))), *words])
    if parts.scheme != "unix":
        return shlex.join(["redis-cli", "-u", redacted(url), *words])
    database = parse_qs(parts.query).get("db", [])
    chosen = ["-n", database[0]] if database else []
    return shlex.join(["redis-cli", "-s", unquote(parts.path), *chosen, *words])


class SecondsRange(click.FloatRange):
    """A range of seconds that refuses NaN, which FloatRange accepts in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds
