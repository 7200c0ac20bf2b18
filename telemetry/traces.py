"""OpenTelemetry's traces: the names of spans and attributes, and how spans are made.

A client makes a producer span for each call. Its context travels with the jobs, in the form of W3C's `traceparent`. A
worker makes a consumer span for each job, below the span of its call, and one for each batch, with links to the calls.
OpenTelemetry is imported only if the program has imported it, or if a worker exports spans. Its errors cost no job.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from millstream.broker.config.telemetry import ENDPOINT_VARIABLE, TelemetrySettings, Traces
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.operations import Operation
from millstream.broker.contract.stages import Stages

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
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

ENDPOINT_VARIABLES = (ENDPOINT_VARIABLE, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"

FLUSH_S = 2.0
"""Seconds that the end of a worker waits at most for a collector that does not answer."""

P = ParamSpec("P")
T = TypeVar("T")


def _harmless(function: Callable[P, T]) -> Callable[P, T | None]:
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
            self._tracer = provider.get_tracer(SYSTEM, version(SYSTEM)) if is_set_up else None
        return self._tracer


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
        self.traceparent = _traceparent(span)

    @_harmless
    def name(self, job_id: str) -> None:
        """Notes the id of the call's first job."""
        self._span.set_attribute(MESSAGE_ID, job_id)

    @_harmless
    def end(self, ending: Ending) -> None:
        """Ends the span. Does nothing the second time."""
        if not self._is_over:
            self._is_over = True
            _end(self._span, ending)


@_harmless
def start_call(tracer: Tracer, call: Call) -> CallSpan:
    """Begins the span of a call, below the caller's current span."""
    from opentelemetry.trace import SpanKind

    name = f"{call.operation} {call.model}" if call.operation else f"send {call.service}"
    attributes: dict[str, AttributeValue] = {
        **_messaging(call.service, "send", "send"),
        **_gen_ai(call.operation, call.model),
        CLIENT_ID: call.client_id,
        PRIORITY: call.priority,
        ROWS: call.rows,
    }
    return CallSpan(tracer.start_span(name, kind=SpanKind.PRODUCER, attributes=attributes))


# -- workers -------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A forward that ended now. `computed`: tokens with padding. `traces`: contexts of its jobs' calls."""

    traces: Sequence[str]
    rows: int
    tokens: int
    computed: int
    seconds: float


class Job(NamedTuple):
    """A job that is settled. `trace`: context of its call. `batch_trace`: that of its batch, or "".

    `clock_ms`: the local clock's lead over the server's.
    """

    id: str
    trace: str
    batch_trace: str
    is_chat: bool
    rows: int
    stages: Stages
    clock_ms: float
    ending: Ending


class WorkerTraces:
    """Makes the spans of one service's worker."""

    def __init__(self, tracer: Tracer, service: str, model: str, operation: Operation, worker: str) -> None:
        self._tracer = tracer
        self._service = service
        self._model = model
        self._operation = operation
        self._worker = worker

    @_harmless
    def record_batch(self, batch: Batch) -> str:
        """Makes the span of a batch, if a call of it is traced. Returns its context, or ""."""
        from opentelemetry.trace import Link, SpanKind

        links = [Link(context) for trace in dict.fromkeys(batch.traces) if (context := _sampled(trace))]
        if not links:
            return ""
        end = time.time_ns()
        attributes: dict[str, AttributeValue] = {
            **_messaging(self._service, "process", "process"),
            CLIENT_ID: self._worker,
            MESSAGES: len(batch.traces),
            BATCH_ROWS: batch.rows,
            BATCH_TOKENS: batch.tokens,
            BATCH_COMPUTED: batch.computed,
        }
        if batch.tokens:
            attributes[BATCH_PADDING] = batch.computed / batch.tokens
        span = self._tracer.start_span(
            f"process {self._service}",
            context=_no_parent(),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
            start_time=end - round(batch.seconds * 1e9),
        )
        span.end(end)
        return _traceparent(span)

    @_harmless
    def record_job(self, job: Job) -> None:
        """Makes the span of a job, below that of its call, if the call is traced."""
        from opentelemetry.trace import Link, SpanKind

        if not _sampled(job.trace):
            return
        stages = job.stages
        operation = gen_ai_operation(self._operation, job.is_chat)
        attributes: dict[str, AttributeValue] = {
            **_messaging(self._service, "process", "job"),
            **_gen_ai(operation, self._model),
            CLIENT_ID: self._worker,
            MESSAGE_ID: job.id,
            ROWS: job.rows,
            ATTEMPTS: stages.attempts,
            BATCH_ROWS: stages.batch,
        }
        batch = _sampled(job.batch_trace)
        span = self._tracer.start_span(
            f"job {self._service}",
            context=_extract(job.trace),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[Link(batch)] if batch else [],
            start_time=_nanoseconds(stages.claimed, job.clock_ms),
        )
        for field, name in EVENTS.items():
            if at := getattr(stages, field):
                span.add_event(name, timestamp=_nanoseconds(at, job.clock_ms))
        _end(span, job.ending, _nanoseconds(stages.settled, job.clock_ms))


@contextmanager
def exporting(settings: TelemetrySettings, environ: Mapping[str, str], worker: str) -> Iterator[None]:
    """Exports spans of this process meanwhile, if the settings say so: by OTLP over HTTP, as OTEL_ variables say.

    Raises ConfigError if traces are on, and OpenTelemetry is not installed or the variables ask for another protocol.
    """
    provider = _provider(worker) if _exports(settings, environ) else None
    try:
        yield
    finally:
        if provider:
            # A thread of its own: the exporter would wait up to 30 s for a collector that does not answer.
            ending = Thread(target=provider.shutdown, name="traces", daemon=True)
            ending.start()
            ending.join(FLUSH_S)


def _exports(settings: TelemetrySettings, environ: Mapping[str, str]) -> bool:
    check(settings.traces)
    endpoint = any(environ.get(name) for name in ENDPOINT_VARIABLES)
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if settings.traces == "off" or is_off or (settings.traces == "auto" and not endpoint):
        return False
    protocol = next((environ[name] for name in PROTOCOL_VARIABLES if environ.get(name)), PROTOCOL)
    problem = ""
    if protocol != PROTOCOL:
        problem = f"OpenTelemetry's variables ask for {protocol}, and workers export by {PROTOCOL}"
    elif not is_installed():
        problem = f'{ENDPOINT_VARIABLE} is set, and OpenTelemetry is not installed: pip install "millstream[otel]"'
    if problem and settings.traces == "on":
        raise ConfigError(problem, hint=f"set {PROTOCOL_VARIABLES[0]}={PROTOCOL}")
    if problem:
        log.warning("no traces: %s", problem)
    return not problem


def _provider(worker: str) -> TracerProvider:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES beat these.
    named = Resource({"service.name": f"{SYSTEM}-worker", "service.instance.id": worker})
    own = Resource.create()
    is_named = not str(own.attributes.get("service.name", "unknown")).startswith("unknown")
    resource = named.merge(own) if is_named else own.merge(named)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider


# -- spans ---------------------------------------------------------------------------------------------------------


def _messaging(service: str, kind: str, name: str) -> Mapping[str, AttributeValue]:
    return {MESSAGING_SYSTEM: SYSTEM, DESTINATION: service, OPERATION_TYPE: kind, OPERATION: name}


def _gen_ai(operation: str, model: str) -> Mapping[str, AttributeValue]:
    if not operation:
        return {}
    return {GEN_AI_OPERATION: operation, GEN_AI_PROVIDER: SYSTEM, GEN_AI_MODEL: model}


def _end(span: Span, ending: Ending, at: int | None = None) -> None:
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


def _traceparent(span: Span) -> str:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get("traceparent", "")


def _extract(trace: str) -> Context:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": trace}, _no_parent())


def _no_parent() -> Context:
    from opentelemetry.context import Context

    return Context()


def _sampled(trace: str) -> SpanContext | None:
    """Returns the span context of a `traceparent`; None if it is malformed, or its call is not sampled."""
    from opentelemetry.trace import get_current_span

    context = get_current_span(_extract(trace)).get_span_context() if trace else None
    return context if context and context.is_valid and context.trace_flags.sampled else None


def _nanoseconds(server_ms: int, clock_ms: float) -> int | None:
    return round((server_ms + clock_ms) * 1e6) if server_ms else None
