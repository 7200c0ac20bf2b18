"""`millstream acl`: the ACL rules of a Redis user with only the rights that one role needs."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import click

from millstream.broker.contract.errors import ConfigError
from millstream.broker.roles import ROLES, SELECTORS_SINCE, Role, rules
from millstream.broker.server.engine import parse_version
from millstream.broker.target import find_prefix
from millstream.broker.transport.access import read_password
from millstream.broker.transport.connection import check
from millstream.cli import options
from millstream.cli.completion import complete_services
from millstream.cli.server import connect, find_server

_USER = re.compile(r"[!-~]{1,64}")
_PART_OF_A_KEY = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
"""No character of these has a meaning in a pattern of keys."""


@click.command()
@click.option("--role", type=click.Choice(ROLES), required=True, help="The role that the user gets rights for.")
@click.option(
    "--service",
    "services",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_services,
    help="Only for this service; may be repeated.",
)
@click.option("--user", metavar="NAME", help="The user's name; by default millstream-ROLE.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Set the password to the file's first line.")
@click.option("--nopass", is_flag=True, help="Let the user log in without a password.")
@click.option("--for-version", metavar="VERSION", help="Version of Redis or Valkey; by default the server's.")
@click.option("--users-acl", is_flag=True, help="Print a line for the server's aclfile, not a command for redis-cli.")
@options.url
@options.prefix
def acl(
    role: Role,
    services: tuple[str, ...],
    user: str | None,
    password_file: Path | None,
    nopass: bool,
    for_version: str | None,
    users_acl: bool,
    url: str | None,
    prefix: str | None,
) -> None:
    """Print the ACL of a user with only the rights that a role needs. Nothing is changed.

    client: calls services. worker: runs `millstream worker run`. viewer: only reads. admin: runs all commands.

    \b
      millstream acl --role client --password-file secret | redis-cli

    Without a password option an existing user keeps its passwords, and a new user cannot log in.
    """
    if nopass and password_file:
        raise click.UsageError("give either --nopass or --password-file, not both")
    name = user or f"millstream-{role}"
    if not _USER.fullmatch(name):
        raise click.BadParameter("at most 64 characters, without spaces", param_hint="--user")
    version, start = _version(for_version, url, prefix)
    for word in (*services, start):
        if not _PART_OF_A_KEY.fullmatch(word):
            raise click.BadParameter(f"{word!r} cannot be part of a key")
    words = [*_password(password_file, nopass), *rules(role, version, services, start)]
    click.echo(" ".join([*(["user"] if users_acl else ["ACL", "SETUSER"]), name, *words]))
    if version[:2] < SELECTORS_SINCE and role in ("client", "gateway", "worker"):
        note = "note: before 7.0 a user may run all of its commands on all of its keys; see docs/operations.md"
        click.echo(note, err=True)


def _version(given: str | None, url: str | None, prefix: str | None) -> tuple[tuple[int, ...], str]:
    """Returns the server's version and the key prefix. Raises ConfigError if `given` is no supported version."""
    if given is not None:
        version = parse_version(given)
        if version < (6, 2):
            raise ConfigError(f"{given!r} is no version, or is too old", hint="say 6.2, 7.0 or newer")
        return version, find_prefix(prefix, os.environ)
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        return check(connection).version, target.prefix


def _password(file: Path | None, nopass: bool) -> list[str]:
    """Returns the rules for the password. They contain its SHA-256 hash, so that the output shows no secret."""
    if nopass:
        return ["resetpass", "nopass"]
    if file is None:
        return []
    return ["resetpass", f"#{hashlib.sha256(read_password(file).encode()).hexdigest()}"]
