"""`millstream job trace`: shows when a job was enqueued, claimed, prepared, run and settled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import click

from millstream.broker.queue.job_trace import JobTrace, read_traces
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.cli import options
from millstream.cli.job_ids import find_jobs, unknown
from millstream.cli.server import connect, find_server
from millstream.cli.table import align, escape, fit, quantity, terminal_width

_DIGITS = 8
"""Digits of a job's id in a table of many jobs."""

_SPARE = ("SETTLE", "PREPARE", "BATCH", "ATTEMPT", "START", "CLAIM", "FORWARD", "WORKER")
"""Columns that a narrow terminal leaves out, the first one first."""

_STAGES = (
    ("enqueue", "enqueued", "the server accepted the job"),
    ("claim", "claimed", "it waited for a worker"),
    ("prepare", "prepared", "it waited for a batch, and was tokenized"),
    ("start", "started", "it waited for the model"),
    ("forward", "ended", "the model ran"),
    ("settle", "settled", "the answer was encoded"),
)
"""Name of each stage, field of the time at which it ended, and what happened in it."""


@click.command("trace")
@click.argument("job_id", metavar="ID")
@options.url
@options.prefix
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Most jobs of one call.")
@options.json_output(". Times are ms of the server's clock")
def trace(job_id: str, url: str | None, prefix: str | None, limit: int, as_json: bool) -> None:
    """Show the times of job ID: enqueue, claim, prepare, start, forward, settle; its worker, attempts and batch.

    ID is the id of a detached call, or of a job. The times of a detached call stay as long as its results. Of other
    jobs the server knows the times of enqueue and settle, for 20 s after the answer. All times are those of the
    server's clock.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        found, more = _read(connection, target.prefix, job_id, limit)
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
    elif len(found) == 1:
        click.echo("\n".join(_describe(found[0])))
    else:
        click.echo(fit(_table(found), terminal_width(), _SPARE))
    if more and not as_json:
        click.echo(f"{quantity(more, 'more job')}: say --limit {more + len(found)}")


def _read(connection: Connection, prefix: str, job_id: str, limit: int) -> tuple[list[JobTrace], int]:
    """Returns the traces of `limit` jobs at most, and the number of others. Raises ResultExpired, InvalidRequest."""
    jobs = find_jobs(connection, prefix, job_id, limit)
    keys = Registry(connection, prefix).keys(jobs.service)
    traces = read_traces(connection, keys, jobs.job_ids, jobs.call) if jobs.service else []
    found = [each for each in traces if each]
    if not found:
        raise unknown(job_id, connection.safe_url)
    return found, jobs.total - len(jobs.job_ids)


def _describe(each: JobTrace) -> Iterator[str]:
    facts = [
        ("job", each.id),
        ("service", " ".join(filter(None, [each.service, each.priority or ""]))),
        ("state", _state(each)),
        ("worker", escape(each.worker) or "-"),
        ("attempt", f"{each.attempts + 1:g}" if each.worker or each.attempts else "-"),
        ("batch", quantity(each.batch, "row") if each.batch else "-"),
    ]
    yield align(facts)
    yield from (f"history  {escape(line)}" for line in each.history)
    yield ""
    yield align(_times(each))


def _state(each: JobTrace) -> str:
    if each.state == "answered" and each.error:
        return f"answered with {each.error}"
    if each.state in ("answered", "settled") or each.enqueued is None:
        return each.state
    return f"{each.state}, for {_ms(each.now - each.enqueued)} since it was enqueued"


def _times(each: JobTrace) -> Iterator[tuple[str, ...]]:
    yield ("STAGE", "ENDED (UTC)", "TOOK", "")
    before: int | None = None
    for name, key, meaning in _STAGES:
        at: int | None = getattr(each, key)
        # A stage after one that is not known has no start.
        took = at - before if at is not None and before is not None else None
        yield name, _clock(at), _ms(took), meaning if took is not None or (at and key == "enqueued") else ""
        before = at
    if each.settled is not None and each.enqueued is not None:
        yield "total", "", _ms(each.settled - each.enqueued), ""


def _table(found: Sequence[JobTrace]) -> Iterator[tuple[str, ...]]:
    yield ("JOB", "STATE", "WORKER", "ATTEMPT", "BATCH", "CLAIM", "PREPARE", "START", "FORWARD", "SETTLE", "TOTAL")
    for each in found:
        *spans, total = _spans(each)
        attempt = f"{each.attempts + 1:g}" if each.worker or each.attempts else "-"
        state = each.error or each.state
        yield (each.id[:_DIGITS], state, escape(each.worker) or "-", attempt, str(each.batch or "-"), *spans, total)


def _spans(each: JobTrace) -> list[str]:
    """Returns how long each stage after enqueue took, and all of them."""
    took = [row[2] for row in _times(each)][2:]
    return took if len(took) == len(_STAGES) else [*took, "-"]


def _clock(ms: int | None) -> str:
    return "-" if ms is None else f"{datetime.fromtimestamp(ms / 1000, UTC):%F %T}.{ms % 1000:03}"


def _ms(span: int | None) -> str:
    """Returns a time span as text. The worker's estimate of the server's clock may be off by a millisecond or so."""
    return "-" if span is None else f"{max(0, span)}ms" if span < 10_000 else f"{span / 1000:.1f}s"
