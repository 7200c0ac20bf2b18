"""`millstream job show`: shows where a job is, who runs it, how many are before it, or how it ended."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime

import click

from millstream.broker.contract.errors import to_wire
from millstream.broker.queue.job_details import MOST_AHEAD
from millstream.broker.queue.views import WorkerView
from millstream.cli import options
from millstream.cli.job_ids import find_jobs
from millstream.cli.job_state import CallState, JobState, read_call
from millstream.cli.server import connect, find_server
from millstream.cli.table import age, escape, fit, quantity, span, terminal_width
from millstream.cli.table import describe as describe_facts

_DIGITS = 8
"""Digits of a job's id in a table of many jobs."""

_HEADING = ("JOB", "STATE", "PRIORITY", "BEFORE IT", "ATTEMPTS", "AGE", "WORKER", "ERROR")
_SPARE = ("PRIORITY", "ATTEMPTS", "AGE", "BEFORE IT", "WORKER")


@click.command()
@click.argument("job_id", metavar="ID")
@options.url
@options.prefix
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Most jobs of one call.")
@options.json_output(", with the times of each job as server ms")
def show(job_id: str, url: str | None, prefix: str | None, limit: int, as_json: bool) -> None:
    """Show job ID: how many jobs are before it, the worker that runs it, or how it ended; attempts, deadline, text.

    ID is the id of a detached call, or 32 hexadecimal digits: of a job, as `millstream queue peek` shows it. A call may
    have several jobs. Jobs of a higher priority run before all that are counted. A job is waiting, given back (it runs
    before those that were never claimed), running, done, failed, cancelled, buried (it is a dead letter), or settled:
    answered to its client.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        found = read_call(connection, target.prefix, find_jobs(connection, target.prefix, job_id, limit))
    if as_json:
        click.echo(json.dumps(as_record(found), ensure_ascii=False, indent=2))
    else:
        click.echo("\n".join(describe(found)))


def describe(found: CallState) -> Iterator[str]:
    """Yields the lines that show it: facts of one job, or a table of many."""
    width = terminal_width()
    if len(found.jobs) == 1 and found.ids.total == 1:
        yield describe_facts([*_facts(found, found.jobs[0]), *_webhook_facts(found)], width)
        return
    counts = Counter(job.state for job in found.jobs)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    shown = "" if len(found.jobs) == found.ids.total else f", the first {len(found.jobs)}"
    facts = [
        ("call", found.ids.given),
        ("service", found.ids.service),
        ("jobs", f"{found.ids.total}, {found.answered} answered{shown}: {states}"),
        ("kept", f"for {age(found.kept_ms)}" if found.kept_ms is not None else "for result_ttl after the last answer"),
        *_webhook_facts(found),
    ]
    yield describe_facts(facts, width)
    yield ""
    yield fit([_HEADING, *(_row(job) for job in found.jobs)], width, _SPARE)


def _facts(found: CallState, job: JobState) -> list[tuple[str, str]]:
    trace, details = job.trace, job.details
    accepted = "-" if trace.enqueued is None else f"{_time(trace.enqueued)}, {age(trace.now - trace.enqueued)} ago"
    facts = [
        ("job", found.ids.given),
        ("service", trace.service),
        ("state", _describe_state(job)),
        *([("priority", trace.priority.value)] if trace.priority else []),
        ("accepted", accepted),
        ("attempts", f"{trace.attempts:g} that did not finish"),
    ]
    if details:
        rows = quantity(trace.rows or 0, "row")
        facts.append(("work", f"{details.op}, {rows}, {quantity(details.tokens, 'token')} estimated"))
        facts.append(("deadline", _describe_deadline(details.deadline, trace.now)))
        if details.text is not None:
            facts.append(("text", f"{quantity(details.text, 'character')} so far"))
    if trace.settled is not None and trace.enqueued is not None:
        facts.append(("took", span(max(0, trace.settled - trace.enqueued))))
    if found.kept_ms is not None:
        facts.append(("kept", f"for {age(found.kept_ms)}"))
    facts += [("history", line) for line in trace.history]
    if job.letter:
        facts.append(("look", f"millstream dead show {trace.service} {job.letter.id}"))
    return [(name, escape(text)) for name, text in facts]


def _webhook_facts(found: CallState) -> list[tuple[str, str]]:
    if not found.webhook:
        return []
    last, is_done = found.webhook.last, found.answered == found.ids.total
    how = "not sent yet" if is_done else "sent when all jobs are answered"
    if last:
        failed = f": {last.reason}" if last.reason else ""
        how = f"{last.step} at {_time(last.at)}, attempt {last.attempt}{failed}"
    return [("webhook", escape(f"{found.webhook.origin}: {how}"))]


def _describe_state(job: JobState) -> str:
    trace, details = job.trace, job.details
    if job.letter:
        return f"buried: {job.letter.reason}"
    if job.error:
        return f"{job.state}: {job.error.code}: {job.error}"
    if job.failed_rows:
        return f"done, {quantity(job.failed_rows, 'row')} failed"
    if trace.state == "running":
        return f"running on {trace.worker} ({_describe_worker(job.worker)})"
    if trace.state in ("waiting", "given back") and details:
        return f"{trace.state}, {_describe_ahead(details.ahead)} before it"
    return f"done, by {trace.worker}" if job.state == "done" and trace.worker else job.state


def _describe_worker(worker: WorkerView | None) -> str:
    if worker is None:
        return "which does not live any more: its jobs are given back"
    forward = f", in a forward for {age(worker.running_ms)}" if worker.running else ""
    return f"{worker.state}{forward}"


def _describe_ahead(ahead: int | None) -> str:
    return f"more than {MOST_AHEAD} jobs" if ahead is None else quantity(ahead, "job")


def _describe_deadline(deadline: int | None, now: int) -> str:
    if deadline is None:
        return "none"
    return f"in {age(deadline - now)}" if deadline >= now else f"passed {age(now - deadline)} ago"


def _row(job: JobState) -> tuple[str, ...]:
    trace = job.trace
    waits = trace.state in ("waiting", "given back") and job.details
    error = job.error.code if job.error else f"{quantity(job.failed_rows, 'row')}" if job.failed_rows else "-"
    return (
        trace.id[:_DIGITS],
        job.state,
        trace.priority.value if trace.priority else "-",
        "-" if not waits else f">{MOST_AHEAD}" if waits.ahead is None else str(waits.ahead),
        f"{trace.attempts:g}",
        "-" if trace.enqueued is None else age(trace.now - trace.enqueued),
        escape(trace.worker) or "-",
        error,
    )


def _time(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%FT%TZ}"


def as_record(found: CallState) -> dict[str, object]:
    """Returns the state as a JSON object."""
    return {
        "id": found.ids.given,
        "service": found.ids.service,
        "total": found.ids.total,
        "answered": found.answered,
        "kept_ms": found.kept_ms,
        "webhook": asdict(found.webhook) if found.webhook else None,
        "jobs": [_job_record(job) for job in found.jobs],
    }


def _job_record(job: JobState) -> dict[str, object]:
    details = asdict(job.details) if job.details else {}
    return {
        **asdict(job.trace),
        **details,
        "state": job.state,
        "error": to_wire(job.error) if job.error else None,
        "failed_rows": job.failed_rows,
        "letter": job.letter.id if job.letter else None,
        "reason": job.letter.reason if job.letter else None,
    }
