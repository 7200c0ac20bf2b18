"""Spans of jobs: what a trace says of a job that a worker answered."""

from __future__ import annotations

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.generation import Generation
from millstream.broker.contract.job import Claim, Reply
from millstream.broker.contract.stages import Stages
from millstream.telemetry.traces import Ending
from millstream.telemetry.worker_traces import Job
from millstream.worker.scheduling.active_job import ActiveJob

_CHAT = b'{"inputs":[{"messages"'
"""Start of the body of a job whose prompt is a chat."""


def job_of(run: ActiveJob | Claim | None, reply: Reply, stages: Stages | None, clock_ms: float) -> Job | None:
    """Returns what the span of a job says; None if its call is not traced. `clock_ms` is as in Job."""
    request = run.request if isinstance(run, ActiveJob) else run.job if run else None
    if request is None or stages is None or not request.trace:
        return None
    batch_trace, first_output = (run.batch_trace, run.first_output_at) if isinstance(run, ActiveJob) else ("", 0)
    is_chat = request.body.startswith(_CHAT)
    text = _generation(reply)
    cached = text.usage.cached if text and text.usage else 0
    ending = _ending(reply, text)
    return Job(
        request.id, request.trace, batch_trace, is_chat, request.rows, stages, clock_ms, ending, first_output, cached
    )


def _ending(reply: Reply, text: Generation | None) -> Ending:
    error = reply.error or next(iter(reply.errors.values()), None)
    if error:
        return Ending(error.code, reply.tokens)
    if text is None:
        return Ending(input_tokens=reply.tokens)
    used = text.usage
    return Ending("", used.prompt if used else 0, used.completion if used else 0, [text.finish_reason])


def _generation(reply: Reply) -> Generation | None:
    """Returns the text of a job that streams; None if its result is something else."""
    if reply.values is None or len(reply.values) != 1 or not isinstance(reply.values[0], dict):
        return None
    try:
        return Generation.read(reply.values[0])
    except Malformed:
        return None
