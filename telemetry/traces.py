"""OpenTelemetry's traces: the names of spans and attributes, and the spans of calls.

A client makes a producer span for each call. Its context travels with the jobs, in the form of W3C's `traceparent`. A
worker makes a consumer span for each job and each batch, see worker_traces.py, and exports them, see trace_export.py.
OpenTelemetry is imported only if the program has imported it, or if a worker exports spans. Its errors cost no job.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from millstream.broker.config.telemetry import Traces
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.operations import Operation

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext, Tracer
    from opentelemetry.util.types import AttributeValue

log = logging.getLogger(__name__)

SYSTEM = "millstream"
"""Name of the instrumentation, and value of `messaging.system` and `gen_ai.provider.name`."""

MESSAGING_SYSTEM = "messaging.system"
DESTINATION = "messaging.destination.name"
OPERATION = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
MESSAGE_ID = "messaging.message.id"
MESSAGES = "messaging.batch.message_count"
CLIENT_ID = "messaging.client.id"
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_MODEL = "gen_ai.request.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
FINISH_REASONS = "gen_ai.response.finish_reasons"
ERROR_TYPE = "error.type"
PRIORITY = "millstream.priority"
ROWS = "millstream.rows"
ATTEMPTS = "millstream.attempts"
BATCH_ROWS = "millstream.batch.rows"
BATCH_TOKENS = "millstream.batch.tokens"
BATCH_COMPUTED = "millstream.batch.computed_tokens"
BATCH_PADDING = "millstream.batch.padding"
"""Computed tokens for each token of the inputs: 1.0 means no padding."""

EVENTS = {"prepared": "prepared", "started": "forward started", "ended": "forward ended"}
"""Names of the events of a job's span, by the field of Stages that has their time."""

P = ParamSpec("P")
T = TypeVar("T")


def harmless(function: Callable[P, T]) -> Callable[P, T | None]:
    """Makes an error of OpenTelemetry, or of the program's own sampler or processor, a warning."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            log.warning("a span could not be made: %s", type(error).__name__, exc_info=error)
            return None

    return call


class Tracing:
    """Finds the tracer of the program's own OpenTelemetry: None if it is not set up, or `setting` is off."""

    def __init__(self, setting: Traces) -> None:
        self._setting = setting
        self._provider: object = None
        self._tracer: Tracer | None = None

    def tracer(self) -> Tracer | None:
        # A program that has set OpenTelemetry up has imported this module.
        api = sys.modules.get("opentelemetry.trace") if self._setting != "off" else None
        if api is None:
            return None
        provider = api.get_tracer_provider()
        if provider is not self._provider:
            self._provider = provider
            is_set_up = not isinstance(provider, api.ProxyTracerProvider)
            self._tracer = provider.get_tracer(SYSTEM, _version()) if is_set_up else None
        return self._tracer


def _version() -> str:
    try:
        return version(SYSTEM)
    except PackageNotFoundError:
        return ""


def check(setting: Traces) -> None:
    """Raises ConfigError if traces are asked for and OpenTelemetry is not installed."""
    if setting == "on" and not is_installed():
        raise ConfigError(
            "telemetry.traces is on, but OpenTelemetry is not installed",
            hint='pip install "millstream[otel]", or leave telemetry.traces out',
        )


def is_installed() -> bool:
    """Whether the extra `otel` is installed."""
    try:
        return find_spec("opentelemetry.sdk.trace") is not None
    except ModuleNotFoundError:
        return False


def gen_ai_operation(operation: Operation, is_chat: bool) -> str:
    """Returns the name of an operation in the gen_ai conventions; "" if they have none."""
    return "chat" if operation.gen_ai and operation.streams and is_chat else operation.gen_ai


# -- clients -------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call that begins. `operation` is its name in the gen_ai conventions, or ""."""

    service: str
    operation: str
    model: str
    priority: str
    rows: int
    client_id: str


class Ending(NamedTuple):
    """The end of a call or of a job. `error` is the code of its error, or ""."""

    error: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: Sequence[str] = ()


class CallSpan:
    """The producer span of a call. `traceparent` is its context, which travels with the jobs."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._is_over = False
        self.traceparent = traceparent_of(span)

    @harmless
    def name(self, job_id: str) -> None:
        """Notes the id of the call's first job."""
        self._span.set_attribute(MESSAGE_ID, job_id)

    @harmless
    def end(self, ending: Ending) -> None:
        """Ends the span. Does nothing the second time."""
        if not self._is_over:
            self._is_over = True
            end_span(self._span, ending)


@harmless
def start_call(tracer: Tracer, call: Call) -> CallSpan:
    """Begins the span of a call, below the caller's current span."""
    from opentelemetry.trace import SpanKind

    name = f"{call.operation} {call.model}" if call.operation else f"send {call.service}"
    attributes: dict[str, AttributeValue] = {
        **messaging(call.service, "send", "send"),
        **gen_ai(call.operation, call.model),
        CLIENT_ID: call.client_id,
        PRIORITY: call.priority,
        ROWS: call.rows,
    }
    return CallSpan(tracer.start_span(name, kind=SpanKind.PRODUCER, attributes=attributes))


# -- spans ---------------------------------------------------------------------------------------------------------


def messaging(service: str, kind: str, name: str) -> Mapping[str, AttributeValue]:
    return {MESSAGING_SYSTEM: SYSTEM, DESTINATION: service, OPERATION_TYPE: kind, OPERATION: name}


def gen_ai(operation: str, model: str) -> Mapping[str, AttributeValue]:
    if not operation:
        return {}
    return {GEN_AI_OPERATION: operation, GEN_AI_PROVIDER: SYSTEM, GEN_AI_MODEL: model}


def end_span(span: Span, ending: Ending, at: int | None = None) -> None:
    from opentelemetry.trace import StatusCode

    if ending.input_tokens:
        span.set_attribute(INPUT_TOKENS, ending.input_tokens)
    if ending.output_tokens:
        span.set_attribute(OUTPUT_TOKENS, ending.output_tokens)
    if ending.finish_reasons:
        span.set_attribute(FINISH_REASONS, list(ending.finish_reasons))
    if ending.error:
        # Without its message, which may quote an input.
        span.set_attribute(ERROR_TYPE, ending.error)
        span.set_status(StatusCode.ERROR)
    span.end(at)


def traceparent_of(span: Span) -> str:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get("traceparent", "")


def extract(trace: str) -> Context:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": trace}, no_parent())


def below(span: Span) -> Context:
    """Returns the context of spans below `span`."""
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span, no_parent())


def no_parent() -> Context:
    from opentelemetry.context import Context

    return Context()


def sampled(trace: str) -> SpanContext | None:
    """Returns the span context of a `traceparent`; None if it is malformed, or its call is not sampled."""
    from opentelemetry.trace import get_current_span

    context = get_current_span(extract(trace)).get_span_context() if trace else None
    return context if context and context.is_valid and context.trace_flags.sampled else None
