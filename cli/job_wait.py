"""`millstream job wait` and `millstream job cancel`: the results of a detached call, or its end."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence

import click
import numpy as np

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, PartialFailure, to_wire
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams
from millstream.broker.transport.connection import Connection, translated
from millstream.cli import options
from millstream.cli.generating import write
from millstream.cli.job_ids import find_detached, unknown
from millstream.cli.server import connect, find_server
from millstream.cli.table import quantity
from millstream.client import Client, Generated
from millstream.client.detached_id import DetachedId
from millstream.client.row_results import RowOutcome


@click.command()
@click.argument("job_id", metavar="ID")
@options.url
@options.prefix
@click.option(
    "--timeout", "timeout_s", metavar="TIME", callback=options.duration, help="Longest wait; by default none."
)
@options.json_output(", one line for each row, errors included")
def wait(job_id: str, url: str | None, prefix: str | None, timeout_s: float | None, as_json: bool) -> None:
    """Wait for the results of the detached call ID, and print one line for each row, in order.

    A text is printed as it is, other results as JSON. The error of a row goes to standard error. The exit code is that
    of the error if all rows failed with it, 9 if only some rows failed, 7 after --timeout. The results stay on the
    server until they expire.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        detached = _find(connection, target.prefix, job_id)
    with Client(target.url, prefix=target.prefix) as client:
        outcomes = client.job(str(detached)).outcomes(timeout_s)
    for row, outcome in enumerate(outcomes):
        _print(row, outcome, as_json)
    click.get_current_context().exit(exit_code(outcomes))


@click.command()
@click.argument("job_id", metavar="ID")
@options.url
@options.prefix
@options.json_output(", with the number of jobs by their state before")
def cancel(job_id: str, url: str | None, prefix: str | None, as_json: bool) -> None:
    """Cancel the detached call ID: jobs that wait are taken off the queue, running ones end within about a second.

    Who waits for the call gets the error `cancelled` for these jobs. Answered jobs stay as they are.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection, translated(connection.safe_url):
        detached = _find(connection, target.prefix, job_id)
        counts = _cancel(connection, target.prefix, detached)
    if as_json:
        click.echo(json.dumps({"id": str(detached)} | counts))
    else:
        click.echo(
            f"{detached}: {quantity(counts['waiting'], 'waiting job')} cancelled, "
            f"{counts['running']} will end, {counts['answered']} answered before"
        )


def _find(connection: Connection, prefix: str, job_id: str) -> DetachedId:
    """Returns the detached call of this id. Raises InvalidRequest if it is the id of a job without one."""
    detached = find_detached(connection, prefix, job_id)
    if detached is None:
        raise InvalidRequest(
            f"{job_id!r} is not the id of a detached call that is kept here",
            hint="the jobs of other calls are waited for and cancelled by their clients; see `millstream job show`",
        )
    return detached


def _cancel(connection: Connection, prefix: str, detached: DetachedId) -> dict[str, int]:
    """Returns how many jobs were waiting, running and answered. Raises ResultExpired if there is no such call."""
    keys = Registry(connection, prefix).keys(detached.service)
    streams = Streams(connection.client, keys)
    submitted = streams.submitted(detached.call)
    if submitted is None or not submitted.payload.startswith(f"{detached.shape} "):
        raise unknown(str(detached), connection.safe_url)
    job_ids, found = list(detached.split()), Counter[str]()
    for at in range(0, len(job_ids), MAX_JOBS_PER_CALL):
        found.update(streams.cancel(job_ids[at : at + MAX_JOBS_PER_CALL], "", detached.call))
    return {"waiting": found["waiting"], "running": found["running"], "answered": found["gone"]}


def exit_code(outcomes: Sequence[RowOutcome]) -> int:
    """Returns 0, the exit code of the error with which all rows failed, or that of PartialFailure."""
    errors = [each for each in outcomes if isinstance(each, MillstreamError)]
    if not errors:
        return 0
    codes = {error.exit_code for error in errors}
    return codes.pop() if len(errors) == len(outcomes) and len(codes) == 1 else PartialFailure.exit_code


def _print(row: int, outcome: RowOutcome, as_json: bool) -> None:
    if as_json:
        is_error = isinstance(outcome, MillstreamError)
        sys.stdout.write(json.dumps({"index": row, "error" if is_error else "result": _plain(outcome)}) + "\n")
    elif isinstance(outcome, MillstreamError):
        click.echo(f"millstream: row {row}: {outcome}", err=True)
    else:
        write(f"{_text(outcome)}\n")


def _text(outcome: RowOutcome) -> str:
    if isinstance(outcome, Generated):
        return outcome.text
    return outcome if isinstance(outcome, str) else json.dumps(_plain(outcome), ensure_ascii=False)


def _plain(outcome: RowOutcome) -> object:
    """Returns a row's outcome as JSON."""
    if isinstance(outcome, MillstreamError):
        return to_wire(outcome)
    if isinstance(outcome, Generated):
        return outcome.json()
    return [float(number) for number in outcome] if isinstance(outcome, np.ndarray) else outcome
