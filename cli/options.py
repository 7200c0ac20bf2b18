"""What commands share: the options that name a server, finding it, and the redis-cli line to look into it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

import click

if TYPE_CHECKING:
    from millstream.broker.connection import Connection
    from millstream.broker.target import Target

url = click.option(
    "--url",
    metavar="URL",
    help="The Redis server; by default MILLSTREAM_REDIS_URL, redis.url of ./config.yaml, or a local `millstream up`.",
)
prefix = click.option(
    "--prefix", metavar="PREFIX", help="Start of every key; by default redis.key_prefix of ./config.yaml, or else ms."
)


def find(url: str | None, prefix: str | None) -> Target:
    """The target as `Client` finds it. Raises ConfigError, and BrokerUnavailable where nothing names a server."""
    # The Redis client takes as long to import as all the rest: not for --help.
    from millstream.broker.target import find_target

    return find_target(url, prefix, os.environ)


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """A connection for one command, closed at its end."""
    from millstream.broker.connection import Connection

    connection = Connection(url, name="millstream-cli")
    try:
        yield connection
    finally:
        connection.close()


def redis_cli(url: str, *words: str) -> str:
    """The shell line that runs `words` in redis-cli on the server of `url`; a password is left out."""
    from millstream.broker.connection import redacted

    parts = urlsplit(url)
    if parts.scheme != "unix":
        return shlex.join(["redis-cli", "-u", redacted(url), *words])
    database = parse_qs(parts.query).get("db", [])
    chosen = ["-n", database[0]] if database else []
    return shlex.join(["redis-cli", "-s", unquote(parts.path), *chosen, *words])
