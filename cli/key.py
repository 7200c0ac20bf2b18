"""`millstream key`: makes, lists and revokes the API keys of `millstream serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import click

from millstream.broker.config.spec import PriorityName
from millstream.cli import options
from millstream.cli.groups import Group
from millstream.cli.table import escape, fit, terminal_width
from millstream.gateway.api.keys import ROLES, Key, add_key, digest, make_record, new_key, read_keys, revoke_key

_HEADING = ("NAME", "ROLE", "TENANT", "SERVICES", "HIGHEST", "AT ONCE")
_SPARE = ("AT ONCE", "HIGHEST", "TENANT")
"""Columns that a narrow terminal leaves out, the first one first."""

file_option = click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    default="keys.jsonl",
    show_default=True,
    help="File of keys, which `millstream serve --keys` reads.",
)


@click.group(cls=Group)
def key() -> None:
    """Make, list and revoke the API keys of `millstream serve`.

    The file has the hash of each key, and what the key may do. A running gateway sees changes within a second.
    """


@key.command("add")
@click.argument("name")
@file_option
@click.option("--role", type=click.Choice(ROLES), default="caller", show_default=True, help="What the key may do.")
@click.option("--tenant", default="", help="Tenant of all its calls, for rate limits and routes.")
@click.option("--service", "services", multiple=True, help="Service or route that it may call; by default all.")
@click.option(
    "--highest-priority",
    type=click.Choice(get_args(PriorityName)),
    default="realtime",
    show_default=True,
    help="Most urgent priority of its calls.",
)
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Requests at once, in each gateway process.")
def add(
    name: str,
    file: Path,
    role: str,
    tenant: str,
    services: tuple[str, ...],
    highest_priority: str,
    max_concurrent: int | None,
) -> None:
    """Add a key called NAME to the file, and print it. It is shown only now: the file has its hash.

    A caller calls services, a viewer reads /metrics and /admin, an admin does both.
    """
    made = new_key()
    record = make_record(
        {
            "name": name,
            "sha256": digest(made),
            "role": role,
            "tenant": tenant,
            "services": services,
            "highest_priority": highest_priority,
            "max_concurrent": max_concurrent,
        }
    )
    add_key(file, record)
    click.echo(made)


@key.command("ls")
@file_option
@options.json_output(", without the hashes")
def list_keys(file: Path, as_json: bool) -> None:
    """List the keys of the file, without their hashes."""
    found = sorted(read_keys(file).values(), key=lambda each: each.name)
    if as_json:
        click.echo(json.dumps([each.model_dump(exclude={"sha256"}) for each in found], indent=2))
    elif found:
        click.echo(fit([_HEADING, *map(_row, found)], terminal_width(), _SPARE))
    else:
        click.echo(f"{file}: no key")


@key.command("revoke")
@click.argument("name")
@file_option
def revoke(name: str, file: Path) -> None:
    """Remove the key called NAME from the file: a running gateway refuses it within a second."""
    revoke_key(file, name)
    click.echo(f"{escape(name)} is revoked")


def _row(each: Key) -> tuple[str, ...]:
    services = ", ".join(each.services) or "all"
    return each.name, each.role, each.tenant, services, each.highest_priority, str(each.max_concurrent or "")
