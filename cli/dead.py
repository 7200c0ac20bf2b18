"""`millstream dead`: lists the jobs that could not succeed, runs them again or removes them."""

from __future__ import annotations

import json

import click

from millstream.broker.contract.errors import InvalidRequest, PartialFailure
from millstream.broker.queue.deadletters import DeadLetters, Letter
from millstream.broker.queue.figure_text import attempt, iso_time
from millstream.cli import options
from millstream.cli.groups import Group
from millstream.cli.main import report
from millstream.cli.server import open_service
from millstream.cli.table import escape, fit, quantity, terminal_width

_HEADING = ("ID", "BURIED", "REASON", "PRIORITY", "OP", "ROWS", "ATTEMPTS", "CONSUMER")
_SPARE = ("OP", "ROWS", "PRIORITY", "ATTEMPTS", "CONSUMER", "BURIED")
"""Columns that a narrow terminal leaves out, the first one first."""

ROOM_S = 60.0
"""Longest wait, in seconds, for room in the queue when a dead letter is run again."""

_REASON_SHOWN = 60
"""Characters of a reason that a table shows at most."""


@click.group(cls=Group)
def dead() -> None:
    """List a service's dead letters, run them again or remove them."""


@dead.command("ls")
@options.service
@options.url
@options.prefix
@click.option("--count", type=click.IntRange(min=1), default=20, show_default=True, help="Most letters to list.")
@click.option("--before", metavar="ID", help="List letters older than this one: the next page.")
@options.json_output(", with every field of each letter")
def list_letters(
    service: str, url: str | None, prefix: str | None, count: int, before: str | None, as_json: bool
) -> None:
    """List the dead letters of SERVICE, the newest first.

    CONSUMER is the worker that held the job when it was buried. ATTEMPTS is how often the job was started without
    being finished.
    """
    with open_service(service, url, prefix) as (connection, keys):
        letters = DeadLetters.open(connection, keys)
        found, total = letters.page(count, before), len(letters)
    if as_json:
        _print(json.dumps([as_record(letter) for letter in found], ensure_ascii=False, indent=2))
    elif found:
        _print(fit([_HEADING, *(_row(letter) for letter in found)], terminal_width(), _SPARE))
        if total > len(found) == count:
            click.echo(f"{total} in all; older ones: --before {found[-1].id}", err=True)
    else:
        click.echo(f"{service}: no {'older ' if before else ''}dead letter")


@dead.command()
@options.service
@click.argument("letter_id", metavar="ID")
@options.url
@options.prefix
@options.json_output()
def show(service: str, letter_id: str, url: str | None, prefix: str | None, as_json: bool) -> None:
    """Show one dead letter of SERVICE, with the fields of its job in the stream."""
    with open_service(service, url, prefix) as (connection, keys):
        letter = DeadLetters.open(connection, keys).find(letter_id)
    record = as_record(letter)
    if as_json:
        _print(json.dumps(record, ensure_ascii=False, indent=2))
        return
    known = {name: value for name, value in record.items() if name not in ("fields", "history") and value is not None}
    lines = [f"{name} {value}" for name, value in known.items()]
    lines += [f"history {attempt(line)}" for line in letter.history]
    lines += [f"{name} {value}" for name, value in letter.texts().items()]
    _print("\n".join(map(escape, lines)))


@dead.command()
@options.service
@click.argument("letter_ids", metavar="[ID]...", nargs=-1)
@options.url
@options.prefix
@click.option("--all", "everything", is_flag=True, help="Run all letters that can run again; the others stay.")
@click.pass_context
def requeue(
    ctx: click.Context, service: str, letter_ids: tuple[str, ...], url: str | None, prefix: str | None, everything: bool
) -> None:
    """Run dead letters of SERVICE again, each as a new detached job, and print the new ids.

    A letter is removed when its job is accepted. `client.job(ID)` finds the answer as long as results are kept.
    """
    if bool(letter_ids) == everything:
        raise InvalidRequest("requeue needs either ids or --all", hint="`millstream dead ls` lists the ids")
    with open_service(service, url, prefix) as (connection, keys):
        letters = DeadLetters.open(connection, keys)
        failures = 0
        for letter in letters if everything else [letters.find(each) for each in dict.fromkeys(letter_ids)]:
            try:
                click.echo(f"{letter.id} is {_requeue(letters, service, letter)}")
            except InvalidRequest as error:
                report(error)
                failures += 1
    if failures:
        ctx.exit(PartialFailure.exit_code if everything else InvalidRequest.exit_code)


@dead.command()
@options.service
@options.url
@options.prefix
def export(service: str, url: str | None, prefix: str | None) -> None:
    """Print all dead letters of SERVICE, the newest first, as one JSON object per line.

    Bytes that are not UTF-8, which only malformed letters have, are printed as backslash escapes.
    """
    with open_service(service, url, prefix) as (connection, keys):
        for letter in DeadLetters.open(connection, keys):
            _print(json.dumps(as_record(letter), ensure_ascii=False))


@dead.command()
@options.service
@click.argument("letter_ids", metavar="[ID]...", nargs=-1)
@options.url
@options.prefix
@options.yes
def purge(service: str, letter_ids: tuple[str, ...], url: str | None, prefix: str | None, yes: bool) -> None:
    """Remove dead letters of SERVICE, by default all."""
    with open_service(service, url, prefix) as (connection, keys):
        letters = DeadLetters.open(connection, keys)
        options.confirm(f"Remove {quantity(len(letter_ids) or len(letters), 'dead letter')} of {service}?", yes)
        removed = letters.remove(letter_ids) if letter_ids else letters.purge()
    click.echo(f"{service}: {quantity(removed, 'dead letter')} removed")


def as_record(letter: Letter) -> dict[str, object]:
    """Returns a letter as a JSON object; `buried_at` is in ms since 1970."""
    return {
        "id": letter.id,
        "reason": letter.reason,
        "entry": letter.entry,
        "buried_at": letter.buried_at,
        "priority": letter.priority.value,
        "attempts": letter.attempts,
        "consumer": letter.consumer,
        "history": list(letter.history),
        "fields": letter.texts(),
    }


def _requeue(letters: DeadLetters, service: str, letter: Letter) -> str:
    """Runs the letter's job again. Returns the id by which a client finds the answer."""
    # Imported here: the client takes 80 ms, and no other command of this group needs it.
    from millstream.client.detached_id import DetachedId

    job_id = letters.requeue(letter, ROOM_S)
    return str(DetachedId.of_job(service, int(letter.fields[b"rows"]), job_id))


def _row(letter: Letter) -> tuple[str, ...]:
    texts = letter.texts()
    buried = "-" if letter.buried_at is None else iso_time(letter.buried_at)
    reason = letter.reason if len(letter.reason) <= _REASON_SHOWN else f"{letter.reason[:_REASON_SHOWN]}..."
    cells = (reason, letter.priority.value, texts.get("op", "-"), texts.get("rows", "-"))
    attempts = "-" if letter.attempts is None else f"{letter.attempts:g}"
    return letter.id, buried, *(escape(cell) for cell in cells), attempts, escape(letter.consumer or "-")


def _print(text: str) -> None:
    # As bytes: the stored text is UTF-8, and the terminal's locale may be another one.
    click.echo(text.encode())
