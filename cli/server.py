"""Finds the server of a command, opens connections to it, and makes redis-cli lines for its URL."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from millstream.broker.config.url import read_url, redacted
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.target import Target, find_target
from millstream.broker.transport.access import without_password_file
from millstream.broker.transport.connection import Connection, translated


def find_server(url: str | None, prefix: str | None) -> Target:
    """Returns the target that `Client` would use. Raises ConfigError, or BrokerUnavailable if no server is named."""
    return find_target(url, prefix, os.environ)


@contextmanager
def connect(url: str) -> Iterator[Connection]:
    """Opens a connection for one command, and closes it at the end."""
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
    target = find_server(url, prefix)
    with connect(target.url) as connection, translated(connection.safe_url):
        registry = Registry(connection, target.prefix)
        # Raises UnknownService with a list of the registered services.
        registry.read(service)
        yield connection, registry.keys(service)


def redis_cli(url: str, *words: str) -> str:
    """Returns the shell line that runs `words` in redis-cli on the server of `url`, with *** for a password.

    For a master under Sentinel the host in the line is MASTER, because the master may change.
    """
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
