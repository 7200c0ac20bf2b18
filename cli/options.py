"""What commands share: the options that name a server, finding it, and the redis-cli line to look into it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

import click

if TYPE_CHECKING:
    from millstream.broker.connection import Connection

url = click.option(
    "--url",
    metavar="URL",
    help="The Redis server; by default MILLSTREAM_REDIS_URL, redis.url of ./config.yaml, or a local `millstream up`.",
)
prefix = click.option(
    "--prefix", metavar="PREFIX", help="Start of every key; by default redis.key_prefix of ./config.yaml, or else ms."
)


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, which keys on it, and how long the results of detached jobs are kept there."""

    url: str
    prefix: str
    result_ttl_s: float


def find(url: str | None, prefix: str | None) -> Target:
    """The target as `Client` finds it. Raises ConfigError, and BrokerUnavailable where nothing names a server."""
    # The Redis client takes as long to import as all the rest: not for --help.
    from millstream.broker.config import DEFAULT_PATH, RedisSettings, load
    from millstream.broker.connection import find_url

    config = load(DEFAULT_PATH) if (url is None or prefix is None) and DEFAULT_PATH.is_file() else None
    settings = config.redis if config else RedisSettings()
    return Target(find_url(url, config, os.environ), prefix or settings.key_prefix, settings.result_ttl)


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
