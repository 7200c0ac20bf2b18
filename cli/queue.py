"""`millstream queue`: shows waiting jobs, jobs in flight and workers. operate.py has the commands that change them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.inspector import Entry, Inspector, ServiceView
from millstream.broker.queue.registry import Registry
from millstream.cli import operate, options
from millstream.cli.groups import Group
from millstream.cli.server import connect, find_server, redis_cli
from millstream.cli.show import as_record, pause_text, show
from millstream.cli.table import age, escape, fit, number, terminal_width

_HEADING = (
    "SERVICE",
    "REALTIME",
    "NORMAL",
    "BATCH",
    "IN FLIGHT",
    "RETURNED",
    "OLDEST",
    "WORKERS",
    "ROWS/FORWARD",
    "PADDING",
    "REFUSED",
    "DEAD",
    "PAUSED",
)
_SPARE = ("PADDING", "ROWS/FORWARD", "REFUSED", "RETURNED", "PAUSED", "DEAD", "IN FLIGHT")
"""Columns that a narrow terminal leaves out, the first one first."""


@click.group(cls=Group)
def queue() -> None:
    """Show, pause, drain or empty the queues."""


for command in (show, operate.pause, operate.resume, operate.purge, operate.drain):
    queue.add_command(command)


@queue.command("ls")
@options.url
@options.prefix
@options.json_output(", with the figures of every worker")
def list_services(url: str | None, prefix: str | None, as_json: bool) -> None:
    """List the services: jobs that wait by priority, jobs in flight, workers, batches, dead letters.

    RETURNED counts the jobs of workers that died; they run next. OLDEST is the age of the oldest job. REFUSED counts
    refused jobs since the last day without any; --json has the reasons. PAUSED has the remaining time, if the pause
    has an end.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        views = Inspector(connection, target.prefix).services()
        where = connection.safe_url
    if as_json:
        click.echo(json.dumps([as_record(view) for view in views], ensure_ascii=False, indent=2))
    elif views:
        click.echo(fit([_HEADING, *(_row(view) for view in views)], terminal_width(), _SPARE))
    else:
        click.echo(f"no service is registered on {where}")


@queue.command()
@options.service
@options.url
@options.prefix
@click.option("--priority", type=click.Choice(["realtime", "normal", "batch"]), help="By default all three.")
@click.option("--count", type=click.IntRange(min=1), default=10, show_default=True, help="Entries of each priority.")
@options.json_output()
def peek(service: str, url: str | None, prefix: str | None, priority: str | None, count: int, as_json: bool) -> None:
    """Show the oldest waiting jobs of SERVICE as they are in the stream, and the redis-cli line that prints them."""
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        # Raises UnknownService with a list of the registered services.
        Registry(connection, target.prefix).read(service)
        inspector = Inspector(connection, target.prefix)
        chosen = [Priority(priority)] if priority else PRIORITIES
        found = {each: inspector.peek(service, each, count) for each in chosen}
    if as_json:
        click.echo(json.dumps([{"priority": each} | asdict(peeked) for each, peeked in found.items()], indent=2))
        return
    for peeked in found.values():
        start = "-" if peeked.after == "0-0" else f"({peeked.after}"
        words = ("XRANGE", peeked.stream, start, "+", "COUNT", str(count))
        click.echo(f"# {redis_cli(target.url, *words)}")
        _print(peeked.entries)


def _print(entries: Sequence[Entry]) -> None:
    for entry in entries:
        lines = [entry.id, *(f"{name} {value}" for name, value in entry.fields.items())]
        # As bytes: the stored text is UTF-8, and the terminal's locale may be another one.
        click.echo("\n".join(map(escape, lines)).encode())


def _row(view: ServiceView) -> tuple[str, ...]:
    return (
        view.name,
        *(str(count) for count in view.waiting.values()),
        str(view.in_flight),
        str(view.returned),
        age(view.oldest_ms),
        str(len(view.workers)),
        number(view.rows_per_forward, 1),
        number(view.padding, 2),
        str(sum(view.refused.values())),
        str(view.dead_letters),
        pause_text(view.paused),
    )
