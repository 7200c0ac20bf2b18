"""What commands share: the options that name a server, finding it, and the redis-cli line to look into it."""

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
    """The seconds of an option such as 500ms, 10s, 5m or 2h; for `callback=`."""
    if value is None:
        return None
    try:
        given = seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not given:
        raise click.BadParameter("must be above 0")
    return given


def find(url: str | None, prefix: str | None) -> Target:
    """The target as `Client` finds it. Raises ConfigError, and BrokerUnavailable where nothing names a server."""
    # The Redis client takes as long to import as all the rest: not for --help.
    from millstream.broker.target import find_target

    return find_target(url, prefix, os.environ)


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """A connection for one command, closed at its end."""
    from millstream.broker.transport.connection import Connection

    connection = Connection(url, name="millstream-cli")
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def opened(service: str, url: str | None, prefix: str | None) -> Iterator[tuple[Connection, ServiceKeys]]:
    """A connection, for one command, to the server of a registered service, and the service's keys.

    Raises UnknownService, ConfigError, BrokerUnavailable; inside, the library's errors come as ours.
    """
    target = find(url, prefix)
    from millstream.broker.queue.registry import Registry
    from millstream.broker.transport.connection import translated

    with connected(target.url) as connection, translated(connection.safe_url):
        registry = Registry(connection, target.prefix)
        # Its error knows the services there are.
        registry.read(service)
        yield connection, registry.keys(service)


def confirm(question: str, yes: bool) -> None:
    """Ask on the terminal, unless the answer is given. Raises InvalidRequest where there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(question, hint="there is no terminal to answer on: say --yes")
    click.confirm(question, abort=True)


def redis_cli(url: str, *words: str) -> str:
    """The shell line that runs `words` in redis-cli on the server of `url`; a password is left out.

    Of a master under Sentinel the line says MASTER, since which server that is may change.
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
    """A number of seconds; not-a-number, which is within any range, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds
