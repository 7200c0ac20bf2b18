"""`millstream queue`: what waits, what runs, and who works. What changes anything is in operate.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from millstream.cli import operate, options
from millstream.cli.show import as_record, show
from millstream.cli.table import age, aligned, harmless, number

if TYPE_CHECKING:
    from millstream.broker.queue.inspector import Entry, ServiceView
    from millstream.broker.queue.pause import Pause

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


@click.group()
def queue() -> None:
    """Look into the queues, pause them, empty them."""


for command in (show, operate.pause, operate.resume, operate.purge, operate.drain):
    queue.add_command(command)


@queue.command("ls")
@options.url
@options.prefix
@click.option("--json", "as_json", is_flag=True, help="As JSON, with every worker's own figures.")
def list_services(url: str | None, prefix: str | None, as_json: bool) -> None:
    """List the services: jobs that wait by priority, jobs in flight, workers, batches, dead letters.

    RETURNED jobs were given back by workers that died, and run next. OLDEST is the age of the oldest job. REFUSED is
    how often jobs were turned away, since the last day without any; --json has the reasons. PAUSED says for how long,
    where it was given a time.
    """
    target = options.find(url, prefix)
    from millstream.broker.queue.inspector import Inspector

    with options.connected(target.url) as connection:
        views = Inspector(connection, target.prefix).services()
        where = connection.safe_url
    if as_json:
        click.echo(json.dumps([as_record(view) for view in views], ensure_ascii=False, indent=2))
    elif views:
        click.echo(aligned([_HEADING, *(_row(view) for view in views)]))
    else:
        click.echo(f"no service is registered on {where}")


@queue.command()
@click.argument("service")
@options.url
@options.prefix
@click.option("--priority", type=click.Choice(["realtime", "normal", "batch"]), help="By default all three.")
@click.option("--count", type=click.IntRange(min=1), default=10, show_default=True, help="Entries of each priority.")
def peek(service: str, url: str | None, prefix: str | None, priority: str | None, count: int) -> None:
    """Show the oldest jobs that wait for SERVICE, as they lie in the stream, and the redis-cli line that does."""
    target = options.find(url, prefix)
    from millstream.broker.contract.job import PRIORITIES, Priority
    from millstream.broker.queue.inspector import Inspector
    from millstream.broker.queue.registry import Registry

    with options.connected(target.url) as connection:
        # Its error knows the services there are.
        Registry(connection, target.prefix).read(service)
        inspector = Inspector(connection, target.prefix)
        for each in [Priority(priority)] if priority else PRIORITIES:
            found = inspector.peek(service, each, count)
            start = "-" if found.after == "0-0" else f"({found.after}"
            words = ("XRANGE", found.stream, start, "+", "COUNT", str(count))
            click.echo(f"# {options.redis_cli(target.url, *words)}")
            _print(found.entries)


def _print(entries: Sequence[Entry]) -> None:
    for entry in entries:
        lines = [entry.id, *(f"{name} {value}" for name, value in entry.fields.items())]
        # As bytes: what lies there is UTF-8, whatever this terminal's locale says.
        click.echo("\n".join(map(harmless, lines)).encode())


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
        _paused(view.paused),
    )


def _paused(pause: Pause | None) -> str:
    if pause is None:
        return "-"
    lasts = "yes" if pause.left_ms is None else age(pause.left_ms)
    return f"{lasts}, refusing" if pause.refusing else lasts
