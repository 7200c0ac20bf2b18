"""`millstream bulk`: sends a file of any size through the queue, shows how far it is, and goes on after it ended."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click

from millstream.broker.contract.errors import BrokerUnavailable, InvalidRequest, PartialFailure
from millstream.cli import options
from millstream.cli.bulk_progress import Display
from millstream.cli.completion import complete_services
from millstream.cli.groups import Group
from millstream.cli.main import INTERRUPTED
from millstream.cli.server import find_server
from millstream.cli.table import escape, quantity
from millstream.client import BulkProgress, Client
from millstream.client.bulk.manifest import ERRORS, SPOOL, read_manifest
from millstream.client.bulk.opening import InputFormat
from millstream.client.bulk.plan import STDIN, WINDOW
from millstream.client.bulk.sinks import OutputFormat

_output = click.option(
    "-o", "--output", required=True, metavar="FOLDER", type=click.Path(file_okay=False, path_type=Path)
)
_window = click.option(
    "--window",
    type=click.IntRange(min=1),
    default=WINDOW,
    show_default=True,
    metavar="NUMBER",
    help="Rows in flight at most.",
)
_tenant = click.option("--tenant", default="", metavar="NAME", help="Tenant whose rate limit the run uses.")


@click.group(cls=Group)
def bulk() -> None:
    """Send files of any size through the queue, with runs that go on after they ended."""


@bulk.command("run")
@click.argument("source", metavar="INPUT")
@_output
@click.option(
    "--service", required=True, metavar="NAME", shell_complete=complete_services, help="The service that gets the rows."
)
@click.option(
    "--input-format",
    type=click.Choice(get_args(InputFormat)),
    default="auto",
    show_default=True,
    help="What INPUT holds; auto means by its name.",
)
@click.option("--format", type=click.Choice(get_args(OutputFormat)), default="jsonl", show_default=True)
@click.option("--column", metavar="NAME", help="Field or column to send, instead of the whole JSON value.")
@click.option("--id", "id_column", metavar="NAME", help="Field or column to write beside each result.")
@click.option(
    "--option",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="Option of the model, such as dimensions=256; JSON or a text. May be given several times.",
)
@click.option("--shard-rows", type=click.IntRange(min=1), metavar="NUMBER", help="Rows of a shard, by default 2048.")
@_window
@click.option(
    "--shard",
    "part",
    default="1/1",
    metavar="I/N",
    help="Do only every Nth shard, from the Ith on: N jobs on several hosts, each with a FOLDER of its own.",
)
@_tenant
@click.option("--version", default="", metavar="NAME", help="Version that gets all rows, if the service is a route.")
@options.url
@options.prefix
def run(
    source: str,
    output: Path,
    service: str,
    input_format: InputFormat,
    format: OutputFormat,
    column: str | None,
    id_column: str | None,
    settings: Sequence[str],
    shard_rows: int | None,
    window: int,
    part: str,
    tenant: str,
    version: str,
    url: str | None,
    prefix: str | None,
) -> None:
    """Send each row of INPUT through a service, and write the results to FOLDER.

    INPUT is a file of JSON lines, CSV, Parquet or lines of text, a batch file of OpenAI's API, a folder of text files,
    or - for standard input. FOLDER gets the results in files part-*, in the order of the input, and the rows that
    failed in errors.jsonl. If the run ends early, the same command goes on: it does no finished shard again. Exit
    status 9: some rows failed.
    """
    if source == STDIN and sys.stdin.isatty() and not (output / SPOOL).exists():
        raise click.UsageError("standard input is a terminal: give a file, or send one to standard input.")
    given = _read_settings(settings)
    target = find_server(url, prefix)
    display = Display(sys.stderr)
    with _saying_how_to_go_on(display), Client(target.url, prefix=target.prefix) as client, display:
        done = client.bulk(
            service,
            source,
            output,
            input_format=input_format,
            format=format,
            column=column,
            id_column=id_column,
            shard_rows=shard_rows,
            window=window,
            part=part,
            tenant=tenant,
            version=version,
            progress=display.show,
            **given,
        )
    _report(done, "done")


@contextmanager
def _saying_how_to_go_on(display: Display) -> Iterator[None]:
    """Prints the command that goes on if the block is interrupted, or the server is lost after it began."""
    try:
        yield
    except KeyboardInterrupt:
        _say_how_to_go_on()
        click.get_current_context().exit(INTERRUPTED)
    except BrokerUnavailable:
        if display.began:
            _say_how_to_go_on()
        raise


def _read_settings(settings: Sequence[str]) -> Mapping[str, Any]:
    """Returns the options of the model. Raises UsageError if one has no name, or is an argument of `Client.bulk`."""
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (equals and name.isidentifier()) or name in _OURS:
            raise click.UsageError(f"--option {setting!r} is not NAME=VALUE with the name of an option of the model.")
        try:
            given[name] = json.loads(value)
        except (ValueError, RecursionError):
            given[name] = value
    return given


_OURS = frozenset(inspect.signature(Client.bulk).parameters) - {"options"}
"""Arguments of Client.bulk, which are no options of a model."""


def _say_how_to_go_on() -> None:
    words = shlex.join(["millstream", *sys.argv[1:]])
    click.echo(f"millstream: stopped; rows in flight go on in the queue\nTo go on: {words}", err=True)


def _report(done: BulkProgress, what: str) -> None:
    """Prints what a finished run has done, `what` in words. Exits as a call does of which some rows failed."""
    click.echo(f"{quantity(done.rows, 'row')} {what}, {done.failed:,} failed: {escape(str(done.output))}", err=True)
    if done.failed:
        click.echo(f"millstream: the rows that failed are in {escape(str(done.output / ERRORS))}", err=True)
        click.get_current_context().exit(PartialFailure.exit_code)


@bulk.command("retry-failed")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--input", "source", metavar="INPUT", help="The run's input, if it was moved.")
@_window
@_tenant
@options.url
@options.prefix
def retry_failed(
    folder: Path, source: str | None, window: int, tenant: str, url: str | None, prefix: str | None
) -> None:
    """Run the failed rows of the run in FOLDER again, with its service and options.

    Results of rows that succeed now are merged into the files part-*, each of which changes whole or not at all. The
    others stay in errors.jsonl with their new reason. If it ends early, the same command goes on. Exit status 9: some
    rows failed again.
    """
    target = find_server(url, prefix)
    display = Display(sys.stderr)
    with _saying_how_to_go_on(display), Client(target.url, prefix=target.prefix) as client, display:
        done = client.retry_failed(folder, input=source, window=window, tenant=tenant, progress=display.show)
    _report(done, "tried again")


@bulk.command()
@click.argument("folder", type=click.Path(path_type=Path))
@options.json_output()
def status(folder: Path, as_json: bool) -> None:
    """Show how far the run in FOLDER is. Asks no server."""
    record, works = read_manifest(folder)
    if record.header is None:
        raise InvalidRequest(f"the run in {folder} has not begun yet")
    state = "finished" if record.finished else "running" if works else "stopped"
    fields: dict[str, str | int] = {
        "state": state,
        "service": record.header.service,
        "rows": sum(note.rows for note in record.notes),
        "failed": sum(note.failed for note in record.notes),
        "shards": len(record.notes),
    }
    if as_json:
        click.echo(json.dumps(fields))
        return
    for name, value in fields.items():
        click.echo(f"{name:<8} {value}")
