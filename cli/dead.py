"""`millstream dead`: the jobs that could not succeed; to look at, to run again, to remove."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from millstream.cli import options
from millstream.cli.main import report
from millstream.cli.table import aligned, counted, harmless

if TYPE_CHECKING:
    from millstream.broker.contract.keys import ServiceKeys
    from millstream.broker.queue.deadletters import DeadLetters, Letter
    from millstream.broker.transport.connection import Connection

_HEADING = ("ID", "BURIED", "REASON", "PRIORITY", "OP", "ROWS", "ATTEMPTS", "CONSUMER")
ROOM_S = 60.0
"""Seconds that running a dead letter again waits for room in the queue at most."""

_REASON_SHOWN = 60


@click.group()
def dead() -> None:
    """Look into a service's dead letters, run them again or remove them."""


@dead.command("ls")
@options.service
@options.url
@options.prefix
@click.option("--count", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@click.option("--before", metavar="ID", help="Those older than this one: the next page.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all of each letter.")
def list_letters(
    service: str, url: str | None, prefix: str | None, count: int, before: str | None, as_json: bool
) -> None:
    """List the dead letters of SERVICE, the newest first.

    CONSUMER is the worker that held the job when it was buried; ATTEMPTS are starts that did not end.
    """
    with options.opened(service, url, prefix) as (connection, keys):
        letters = _letters(connection, keys)
        found, kept = letters.page(count, before), len(letters)
    if as_json:
        _print(json.dumps([as_record(letter) for letter in found], ensure_ascii=False, indent=2))
    elif found:
        _print(aligned([_HEADING, *(_row(letter) for letter in found)]))
        if kept > len(found) == count:
            click.echo(f"{kept} in all; older ones: --before {found[-1].id}", err=True)
    else:
        click.echo(f"{service}: no {'older ' if before else ''}dead letter")


@dead.command()
@options.service
@click.argument("letter_id", metavar="ID")
@options.url
@options.prefix
def show(service: str, letter_id: str, url: str | None, prefix: str | None) -> None:
    """Show one dead letter of SERVICE, with the job as it lay in its stream."""
    with options.opened(service, url, prefix) as (connection, keys):
        letter = _letters(connection, keys).find(letter_id)
    record = as_record(letter)
    known = {name: value for name, value in record.items() if name not in ("fields", "history") and value is not None}
    lines = [f"{name} {value}" for name, value in known.items()]
    lines += [f"history {_ended(line)}" for line in letter.history]
    lines += [f"{name} {value}" for name, value in _texts(letter).items()]
    _print("\n".join(map(harmless, lines)))


@dead.command()
@options.service
@click.argument("letter_ids", metavar="[ID]...", nargs=-1)
@options.url
@options.prefix
@click.option("--all", "everything", is_flag=True, help="All that can run again; the rest stay.")
@click.pass_context
def requeue(
    ctx: click.Context, service: str, letter_ids: tuple[str, ...], url: str | None, prefix: str | None, everything: bool
) -> None:
    """Run dead letters of SERVICE again, each as a new detached job, and print the new ids.

    A letter goes once its job is accepted. `client.job(ID)` finds the answer, for as long as results are kept.
    """
    from millstream.broker.contract.errors import InvalidRequest, PartialFailure

    if bool(letter_ids) == everything:
        raise InvalidRequest("which letters?", hint="give their ids, or --all")
    with options.opened(service, url, prefix) as (connection, keys):
        letters = _letters(connection, keys)
        left = 0
        for letter in letters if everything else [letters.find(each) for each in dict.fromkeys(letter_ids)]:
            try:
                click.echo(f"{letter.id} is {_requeued(letters, service, letter)}")
            except InvalidRequest as error:
                report(error)
                left += 1
    if left:
        ctx.exit(PartialFailure.exit_code if everything else InvalidRequest.exit_code)


@dead.command()
@options.service
@options.url
@options.prefix
def export(service: str, url: str | None, prefix: str | None) -> None:
    """Print all dead letters of SERVICE, the newest first, as a JSON object a line.

    Bytes that are no UTF-8, which only malformed letters have, come as backslash escapes.
    """
    with options.opened(service, url, prefix) as (connection, keys):
        for letter in _letters(connection, keys):
            _print(json.dumps(as_record(letter), ensure_ascii=False))


@dead.command()
@options.service
@click.argument("letter_ids", metavar="[ID]...", nargs=-1)
@options.url
@options.prefix
@options.yes
def purge(service: str, letter_ids: tuple[str, ...], url: str | None, prefix: str | None, yes: bool) -> None:
    """Remove dead letters of SERVICE, by default all."""
    with options.opened(service, url, prefix) as (connection, keys):
        letters = _letters(connection, keys)
        options.confirm(f"Remove {counted(len(letter_ids) or len(letters), 'dead letter')} of {service}?", yes)
        removed = letters.remove(letter_ids) if letter_ids else letters.purge()
    click.echo(f"{service}: {counted(removed, 'dead letter')} removed")


def as_record(letter: Letter) -> dict[str, object]:
    """A letter as JSON shows it; `buried_at` in ms since 1970."""
    return {
        "id": letter.id,
        "reason": letter.reason,
        "entry": letter.entry,
        "buried_at": letter.buried_at,
        "priority": letter.priority.value,
        "attempts": letter.attempts,
        "consumer": letter.consumer,
        "history": list(letter.history),
        "fields": _texts(letter),
    }


def _ended(line: str) -> str:
    """One start that did not end, with its time as people read it."""
    at, _, rest = line.partition(" ")
    return f"{_time(int(at))} {rest}" if at.isdecimal() and len(at) <= 14 else line


def _time(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%FT%TZ}"


def _letters(connection: Connection, keys: ServiceKeys) -> DeadLetters:
    from millstream.broker.queue.deadletters import DeadLetters
    from millstream.broker.queue.registry import Registry

    spec = Registry(connection, keys.prefix).read(keys.service)
    return DeadLetters(connection.client, keys, replicated=spec.replicated, where=connection.safe_url)


def _requeued(letters: DeadLetters, service: str, letter: Letter) -> str:
    """Run it again; the id by which a client finds its answer."""
    from millstream.client.detached import id_of

    job_id = letters.requeue(letter, ROOM_S)
    rows = int(letter.fields[b"rows"])
    return id_of(service, rows, rows, job_id)


def _texts(letter: Letter) -> dict[str, str]:
    return {
        name.decode(errors="backslashreplace"): value.decode(errors="backslashreplace")
        for name, value in letter.fields.items()
    }


def _row(letter: Letter) -> tuple[str, ...]:
    texts = _texts(letter)
    buried = "-" if letter.buried_at is None else _time(letter.buried_at)
    reason = letter.reason if len(letter.reason) <= _REASON_SHOWN else f"{letter.reason[:_REASON_SHOWN]}..."
    cells = (reason, letter.priority.value, texts.get("op", "-"), texts.get("rows", "-"))
    attempts = "-" if letter.attempts is None else f"{letter.attempts:g}"
    return letter.id, buried, *(harmless(cell) for cell in cells), attempts, harmless(letter.consumer or "-")


def _print(text: str) -> None:
    # As bytes: what lies there is UTF-8, whatever this terminal's locale says.
    click.echo(text.encode())
