"""Spans of calls: what a trace says of a call, if the program has set OpenTelemetry up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.codec import JsonText
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import Operation
from millstream.client.generate import Generated
from millstream.client.transfer import Transfer
from millstream.telemetry.traces import Call, CallSpan, Ending, Tracing, gen_ai_operation, start_call


def begin_span(
    tracing: Tracing, spec: ServiceSpec, operation: Operation, inputs: Sequence[Json], priority: str, client_id: str
) -> CallSpan | None:
    """Returns the span of a call that begins now; None if calls are not traced. `inputs` are encoded as rows."""
    tracer = tracing.tracer()
    if tracer is None:
        return None
    first = inputs[0] if inputs else None
    is_chat = isinstance(first, JsonText) and first.startswith('{"messages"')
    name = gen_ai_operation(operation, is_chat)
    return start_call(tracer, Call(spec.name, name, spec.model.model_name, priority, len(inputs), client_id))


def follow(span: CallSpan, transfer: Transfer) -> None:
    """Ends the span when every row of the call has its outcome."""
    span.name(transfer.id)

    def end_if_over() -> None:
        if transfer.rows.missing <= 0:
            span.end(_ending(transfer))

    transfer.listeners.append(end_if_over)
    end_if_over()


def failed(error: BaseException) -> Ending:
    """Returns the end of a call that raised `error`."""
    return Ending(error.code if isinstance(error, MillstreamError) else type(error).__name__)


def _ending(transfer: Transfer) -> Ending:
    rows = transfer.rows
    texts = _texts(rows.outcomes())
    used = sum(each.usage.get("prompt_tokens", 0) for each in texts)
    made = sum(each.usage.get("completion_tokens", 0) for each in texts)
    error = rows.failure
    return Ending(error.code if error else "", used or rows.tokens, made, [each.finish_reason for each in texts])


def _texts(outcomes: Iterable[object]) -> list[Generated]:
    return [each for each in outcomes if isinstance(each, Generated)]
