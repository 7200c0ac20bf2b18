"""Spans of a worker: one for each job, below the span of its call, and one for each batch, with links to the calls.

The span of a text that grew has two below it: its prefill, and its decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from millstream.broker.contract.operations import Operation
from millstream.broker.contract.stages import Stages
from millstream.telemetry import traces
from millstream.telemetry.traces import (
    Ending,
    below,
    end_span,
    extract,
    gen_ai,
    gen_ai_operation,
    harmless,
    messaging,
    no_parent,
    sampled,
    traceparent_of,
)

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer
    from opentelemetry.util.types import AttributeValue


class Batch(NamedTuple):
    """A forward that ended now. `computed`: tokens with padding. `traces`: contexts of its jobs' calls."""

    traces: Sequence[str]
    rows: int
    tokens: int
    computed: int
    seconds: float


class Job(NamedTuple):
    """A job that is settled. `trace`: context of its call. `batch_trace`: that of its batch, or "".

    `clock_ms`: the local clock's lead over the server's. `first_output`: server ms of the first piece of a text in this
    run, 0 if there was none. `cached_tokens`: those of its prompt that were computed before.
    """

    id: str
    trace: str
    batch_trace: str
    is_chat: bool
    rows: int
    stages: Stages
    clock_ms: float
    ending: Ending
    first_output: int = 0
    cached_tokens: int = 0


class WorkerTraces:
    """Makes the spans of one service's worker."""

    def __init__(self, tracer: Tracer, service: str, model: str, operation: Operation, worker: str) -> None:
        self._tracer = tracer
        self._service = service
        self._model = model
        self._operation = operation
        self._worker = worker

    @harmless
    def record_batch(self, batch: Batch) -> str:
        """Makes the span of a batch, if a call of it is traced. Returns its context, or ""."""
        from opentelemetry.trace import Link, SpanKind

        links = [Link(context) for trace in dict.fromkeys(batch.traces) if (context := sampled(trace))]
        if not links:
            return ""
        end = time.time_ns()
        attributes: dict[str, AttributeValue] = {
            **messaging(self._service, "process", "process"),
            traces.CLIENT_ID: self._worker,
            traces.MESSAGES: len(batch.traces),
            traces.BATCH_ROWS: batch.rows,
            traces.BATCH_TOKENS: batch.tokens,
            traces.BATCH_COMPUTED: batch.computed,
        }
        if batch.tokens:
            attributes[traces.BATCH_PADDING] = batch.computed / batch.tokens
        span = self._tracer.start_span(
            f"process {self._service}",
            context=no_parent(),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
            start_time=end - round(batch.seconds * 1e9),
        )
        span.end(end)
        return traceparent_of(span)

    @harmless
    def record_job(self, job: Job) -> None:
        """Makes the span of a job, below that of its call, if the call is traced."""
        from opentelemetry.trace import Link, SpanKind

        if not sampled(job.trace):
            return
        stages = job.stages
        operation = gen_ai_operation(self._operation, job.is_chat)
        attributes: dict[str, AttributeValue] = {
            **messaging(self._service, "process", "job"),
            **gen_ai(operation, self._model),
            traces.CLIENT_ID: self._worker,
            traces.MESSAGE_ID: job.id,
            traces.ROWS: job.rows,
            traces.ATTEMPTS: stages.attempts,
            traces.BATCH_ROWS: stages.batch,
        }
        batch = sampled(job.batch_trace)
        span = self._tracer.start_span(
            f"job {self._service}",
            context=extract(job.trace),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[Link(batch)] if batch else [],
            start_time=_nanoseconds(stages.claimed, job.clock_ms),
        )
        for field, name in traces.EVENTS.items():
            if at := getattr(stages, field):
                span.add_event(name, timestamp=_nanoseconds(at, job.clock_ms))
        if job.first_output and stages.started:
            self._record_text(span, job)
        end_span(span, job.ending, _nanoseconds(stages.settled, job.clock_ms))

    def _record_text(self, span: Span, job: Job) -> None:
        """Makes the spans of a text's two parts, below that of its job. A text that failed has no numbers of tokens."""
        begin, first, end = job.stages.started, job.first_output, job.stages.ended or job.stages.settled
        used: dict[str, dict[str, AttributeValue]] = {
            "prefill": {traces.INPUT_TOKENS: job.ending.input_tokens, traces.CACHED_TOKENS: job.cached_tokens},
            "decode": {traces.OUTPUT_TOKENS: job.ending.output_tokens},
        }
        for part, (start, stop) in {"prefill": (begin, first), "decode": (first, end)}.items():
            attributes: dict[str, AttributeValue] = {
                traces.DESTINATION: self._service,
                **({} if job.ending.error else used[part]),
            }
            made = self._tracer.start_span(
                f"{part} {self._service}",
                context=below(span),
                attributes=attributes,
                start_time=_nanoseconds(start, job.clock_ms),
            )
            # The two times are taken one after another, each rounded to ms.
            made.end(_nanoseconds(max(start, stop), job.clock_ms))


def _nanoseconds(server_ms: int, clock_ms: float) -> int | None:
    return round((server_ms + clock_ms) * 1e6) if server_ms else None
