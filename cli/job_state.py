"""The state of the jobs that an id names, put together from their entries, replies, workers and dead letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import Cancelled, Malformed, MillstreamError, ModelFailed
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.webhooks import find_receiver
from millstream.broker.queue.deadletters import DeadLetters, Letter
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.job_details import JobDetails, read_details
from millstream.broker.queue.job_trace import JobTrace, read_traces
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.streams import Streams
from millstream.broker.queue.views import WorkerView
from millstream.broker.queue.webhooks import Webhooks, WebhookState
from millstream.broker.transport.connection import Connection, translated
from millstream.cli.job_ids import JobIds, unknown


@dataclass(frozen=True, slots=True)
class JobState:
    """State of one job, with `details` while it is in its stream. `worker` is the live one that holds it.

    `error` is that of all rows, `failed_rows` counts rows with an error of their own. `letter` is its dead letter.
    """

    state: str
    trace: JobTrace
    details: JobDetails | None = None
    worker: WorkerView | None = None
    error: MillstreamError | None = None
    failed_rows: int = 0
    letter: Letter | None = None


@dataclass(frozen=True, slots=True)
class CallWebhook:
    """Receiver of a call's outcome, its `origin` alone. `last`: how the last attempt ended, None if there was none."""

    origin: str
    last: WebhookState | None


@dataclass(frozen=True, slots=True)
class CallState:
    """State of what an id names: its first jobs. `answered` counts all of them.

    `kept_ms` is left to the results, None until all jobs are answered. `webhook` is None if the call has none.
    """

    ids: JobIds
    jobs: Sequence[JobState]
    answered: int = 0
    kept_ms: int | None = None
    webhook: CallWebhook | None = None


def read_call(connection: Connection, prefix: str, ids: JobIds) -> CallState:
    """Returns the state of these jobs. Raises ResultExpired if the server knows none of them, BrokerUnavailable."""
    keys = Registry(connection, prefix).keys(ids.service)
    traces = [each for each in read_traces(connection, keys, ids.job_ids, ids.call) if each] if ids.service else []
    if not traces:
        return _read_buried(connection, prefix, ids)
    details = read_details(connection, keys, [each.id for each in traces if each.state != "answered"])
    holders = _read_holders(connection, prefix, keys, traces)
    with translated(connection.safe_url):
        errors = _read_errors(Streams(connection.client, keys), ids.call, traces)
        submitted = Streams(connection.client, keys).submitted(ids.call) if ids.call else None
        kept_ms = int(connection.client.pttl(keys.call(ids.call))) if ids.call else -1
        jobs = [judge(each, details.get(each.id), holders.get(each.worker), errors.get(each.id)) for each in traces]
        jobs = [_with_letter(connection, keys, each) for each in jobs]
        webhook = _read_webhook(connection, keys, ids.call, submitted.payload) if submitted else None
    answered = submitted.answered if submitted else sum(each.state in ("answered", "settled") for each in traces)
    return CallState(ids, jobs, answered, kept_ms if kept_ms >= 0 and answered == ids.total else None, webhook)


def _read_webhook(connection: Connection, keys: ServiceKeys, call: str, payload: str) -> CallWebhook | None:
    receiver = find_receiver(payload)
    return CallWebhook(receiver.origin, Webhooks(connection.client, keys).read_state(call)) if receiver else None


def _read_holders(
    connection: Connection, prefix: str, keys: ServiceKeys, traces: Sequence[JobTrace]
) -> Mapping[str, WorkerView]:
    if not any(each.worker and each.state == "running" for each in traces):
        return {}
    (view,) = Inspector(connection, prefix).services([keys.service])
    return {worker.consumer: worker for worker in view.workers}


def _read_errors(
    streams: Streams, call: str, traces: Sequence[JobTrace]
) -> Mapping[str, tuple[MillstreamError | None, int]]:
    """Returns the error, and the number of failed rows, of each job that is answered."""
    job_ids = [each.id for each in traces if each.state == "answered"]
    replies = streams.results(call, job_ids) if job_ids else []
    return {job_id: _error_of(reply) for job_id, reply in zip(job_ids, replies, strict=True) if reply}


def _error_of(blob: bytes) -> tuple[MillstreamError | None, int]:
    try:
        reply = decode_reply(blob)
    except Malformed as error:
        return ModelFailed(f"its reply cannot be read: {error}"), 0
    return reply.error, len(reply.errors)


def judge(
    trace: JobTrace,
    details: JobDetails | None,
    worker: WorkerView | None,
    outcome: tuple[MillstreamError | None, int] | None,
) -> JobState:
    """Returns the state of a job, in one word or two, from what the server has of it."""
    error, failed_rows = outcome or (None, 0)
    state: str = trace.state
    if trace.state == "answered":
        state = "cancelled" if isinstance(error, Cancelled) else "failed" if error else "done"
    return JobState(state, trace, details, worker, error, failed_rows)


def _with_letter(connection: Connection, keys: ServiceKeys, job: JobState) -> JobState:
    """Looks for the dead letter of a job that failed, or whose answer is gone: workers bury what cannot run."""
    if job.state not in ("failed", "settled"):
        return job
    letter = _find_letter(connection, keys, job.trace.id)
    return replace(job, state="buried", letter=letter) if letter else job


def _find_letter(connection: Connection, keys: ServiceKeys, job_id: str) -> Letter | None:
    letters = DeadLetters(connection.client, keys)
    return next((letter for letter in letters if letter.fields.get(b"id") == job_id.encode()), None)


def _read_buried(connection: Connection, prefix: str, ids: JobIds) -> CallState:
    """Returns the state of a job of which only its dead letter is left. Raises ResultExpired if there is none."""
    registry = Registry(connection, prefix)
    with translated(connection.safe_url):
        for service in [ids.service] if ids.service else registry.names():
            for job_id in ids.job_ids:
                if letter := _find_letter(connection, registry.keys(service), job_id):
                    trace = JobTrace(service, job_id, "answered", letter.buried_at or 0, attempts=letter.attempts or 0)
                    job = JobState("buried", replace(trace, history=letter.history), letter=letter)
                    return CallState(replace(ids, service=service), [job], 1)
    raise unknown(ids.given, connection.safe_url)
