"""Spans of calls, batches and jobs by OpenTelemetry's SDK: names, attributes, parents and links; off by default."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from millstream.broker.config.load import telemetry_of
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.contract.errors import ConfigError, InvalidRequest
from millstream.broker.contract.operations import ECHO, EMBED, GENERATE
from millstream.broker.contract.stages import Stages
from millstream.client import AsyncClient
from millstream.client.async_calls import AsyncCalls
from millstream.client.testing import FakeClient
from millstream.telemetry import trace_export, traces
from millstream.telemetry.traces import Call, Ending, Tracing, start_call
from millstream.telemetry.worker_traces import Batch, Job, WorkerTraces

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = TRACE[:-1] + "0"
STAGES = Stages("w-1", 0.0, 3, 1_000, 1_010, 1_015, 1_020, 1_060, 1_070)


class Given(Tracing):
    """The tracer of a program that has set OpenTelemetry up."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__("auto")
        self._given = tracer

    def tracer(self) -> Tracer:
        return self._given


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans: InMemorySpanExporter) -> Iterator[TracerProvider]:
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(spans))
    yield made
    made.shutdown()


@pytest.fixture
def tracer(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("tests")


@pytest.fixture
def client(tracer: Tracer) -> Iterator[FakeClient]:
    with FakeClient(dim=4) as made:
        made._calls.tracing = Given(tracer)
        yield made


def attributes(span: ReadableSpan) -> Mapping[str, object]:
    return dict(span.attributes or {})


def the_only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


# -- calls ---------------------------------------------------------------------------------------------------------


def test_a_call_has_a_producer_span_of_the_conventions(client: FakeClient, spans: InMemorySpanExporter) -> None:
    client.embed(["one", "two"], priority="realtime")

    span = the_only(spans)
    found = dict(attributes(span))
    assert (span.name.split()[0], span.kind, span.parent) == ("embeddings", SpanKind.PRODUCER, None)
    assert found.pop("gen_ai.usage.input_tokens")
    assert len(str(found.pop("messaging.message.id"))) == 32
    assert found == {
        "messaging.system": "millstream",
        "messaging.destination.name": "embed",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.client.id": "fake",
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "millstream",
        "gen_ai.request.model": span.name.partition(" ")[2],
        "millstream.priority": "realtime",
        "millstream.rows": 2,
    }


def test_a_call_is_below_the_programs_own_span(client: FakeClient, tracer: Tracer, spans: InMemorySpanExporter) -> None:
    with tracer.start_as_current_span("request") as outer:
        client.rerank("query", ["one"])

    call = spans.get_finished_spans()[0]
    assert call.parent
    assert call.parent.span_id == outer.get_span_context().span_id
    assert call.name == "send rerank"


def test_a_call_of_the_async_client_is_below_the_span_of_its_task(
    client: FakeClient, tracer: Tracer, spans: InMemorySpanExporter
) -> None:
    calls = AsyncClient.__new__(AsyncClient)
    calls._async_calls = AsyncCalls(client._calls)

    async def request(text: str) -> int:
        with tracer.start_as_current_span(text) as outer:
            await calls.submit("embed", [text])
            return outer.get_span_context().span_id

    async def both() -> list[int]:
        return list(await asyncio.gather(request("a"), request("b")))

    outer = asyncio.run(both())

    sent = [each.parent.span_id for each in spans.get_finished_spans() if each.parent]
    assert sorted(sent) == sorted(outer)


@pytest.mark.parametrize(("way", "operation"), [("generate", "text_completion"), ("chat", "chat")])
def test_a_text_has_tokens_and_the_reason_of_its_end(
    client: FakeClient, spans: InMemorySpanExporter, way: str, operation: str
) -> None:
    made = client.generate("say it") if way == "generate" else client.chat([{"role": "user", "content": "say it"}])

    found = attributes(the_only(spans))
    assert found["gen_ai.operation.name"] == operation
    assert found["gen_ai.response.finish_reasons"] == (made.finish_reason,)
    assert found["gen_ai.usage.output_tokens"] == made.usage["completion_tokens"]
    assert found["gen_ai.usage.input_tokens"] == made.usage["prompt_tokens"]


def test_a_failed_call_names_the_code_and_not_the_message(tracer: Tracer, spans: InMemorySpanExporter) -> None:
    refusal = InvalidRequest("quotes a payload")
    with FakeClient(dim=4, errors={"bad": refusal}) as client:
        client._calls.tracing = Given(tracer)
        with pytest.raises(InvalidRequest):
            client.embed(["bad"])

    span = the_only(spans)
    assert (span.status.status_code, attributes(span)["error.type"]) == (StatusCode.ERROR, "invalid_request")
    assert "payload" not in span.to_json()


def test_a_call_that_is_cancelled_ends_its_span(client: FakeClient, spans: InMemorySpanExporter) -> None:
    client.submit("embed", ["a"]).cancel()

    assert len(spans.get_finished_spans()) == 1


def test_jobs_carry_the_context_of_the_call(client: FakeClient, spans: InMemorySpanExporter) -> None:
    found: list[str] = []
    submit = client._calls.channel.submit

    def listen(submissions: Sequence[object]) -> None:
        found.extend(draft.trace for each in submissions for draft in each.group.drafts)  # type: ignore[attr-defined]
        submit(submissions)  # type: ignore[arg-type]

    client._calls.channel.submit = listen  # type: ignore[method-assign]
    client.embed(["one", "two"])

    context = the_only(spans).context
    assert context
    assert {trace[:-2] for trace in found} == {f"00-{context.trace_id:032x}-{context.span_id:016x}-"}


def test_a_detached_call_ends_its_span_when_it_is_accepted(client: FakeClient, spans: InMemorySpanExporter) -> None:
    detached = client.submit_detached("embed", ["a", "b"])

    found = attributes(the_only(spans))
    assert found["messaging.message.id"] == detached.id.rpartition(":")[2]
    assert "error.type" not in found


# -- workers -------------------------------------------------------------------------------------------------------


def test_a_batch_has_links_to_the_calls_of_its_jobs(tracer: Tracer, spans: InMemorySpanExporter) -> None:
    worker = WorkerTraces(tracer, "embed", "minilm", EMBED, "w-1")

    worker.record_batch(Batch([TRACE, "", TRACE, "nonsense", NOT_SAMPLED], 40, 100, 150, 0.25))

    span = the_only(spans)
    assert (span.name, span.kind, span.parent) == ("process embed", SpanKind.CONSUMER, None)
    assert [f"{link.context.trace_id:032x}" for link in span.links] == [TRACE[3:35]]
    assert attributes(span) == {
        "messaging.system": "millstream",
        "messaging.destination.name": "embed",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.client.id": "w-1",
        "messaging.batch.message_count": 5,
        "millstream.batch.rows": 40,
        "millstream.batch.tokens": 100,
        "millstream.batch.computed_tokens": 150,
        "millstream.batch.padding": 1.5,
    }
    assert span.end_time
    assert span.start_time
    assert span.end_time - span.start_time == 250_000_000


@pytest.mark.parametrize("trace", ["", NOT_SAMPLED, "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01"])
def test_no_span_is_made_for_calls_that_are_not_traced(tracer: Tracer, spans: InMemorySpanExporter, trace: str) -> None:
    worker = WorkerTraces(tracer, "embed", "minilm", EMBED, "w-1")

    assert worker.record_batch(Batch([trace], 1, 1, 1, 0.1)) == ""
    worker.record_job(Job("a" * 32, trace, "", False, 1, STAGES, 0.0, Ending()))

    assert spans.get_finished_spans() == ()


def test_a_job_is_below_its_call_and_has_its_stages_as_events(tracer: Tracer, spans: InMemorySpanExporter) -> None:
    worker = WorkerTraces(tracer, "chat", "smollm", GENERATE, "w-1")
    batch = worker.record_batch(Batch([TRACE], 1, 1, 1, 0.1))
    assert batch

    worker.record_job(Job("a" * 32, TRACE, batch, True, 1, STAGES, 5.0, Ending("", 7, 9, ["stop"])))

    process, job = spans.get_finished_spans()
    assert job.parent
    assert f"{job.parent.trace_id:032x}-{job.parent.span_id:016x}" == TRACE[3:-3]
    assert process.context
    assert [link.context.span_id for link in job.links] == [process.context.span_id]
    assert (job.start_time, job.end_time) == (1_015_000_000, 1_075_000_000)
    assert [(each.name, each.timestamp) for each in job.events] == [
        ("prepared", 1_020_000_000),
        ("forward started", 1_025_000_000),
        ("forward ended", 1_065_000_000),
    ]
    found = attributes(job)
    assert (found["gen_ai.operation.name"], found["gen_ai.request.model"]) == ("chat", "smollm")
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (7, 9)
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert (found["messaging.message.id"], found["millstream.batch.rows"]) == ("a" * 32, 3)


def test_a_text_has_its_prefill_and_its_decoding_below_its_job(tracer: Tracer, spans: InMemorySpanExporter) -> None:
    worker = WorkerTraces(tracer, "chat", "smollm", GENERATE, "w-1")

    worker.record_job(Job("a" * 32, TRACE, "", True, 1, STAGES, 5.0, Ending("", 7, 9, ["stop"]), 1_040, 3))

    prefill, decode, job = spans.get_finished_spans()
    assert job.context
    for part, name, start, end in (
        (prefill, "prefill chat", 1_025_000_000, 1_045_000_000),
        (decode, "decode chat", 1_045_000_000, 1_065_000_000),
    ):
        assert part.parent
        assert (part.name, part.parent.span_id) == (name, job.context.span_id)
        assert (part.start_time, part.end_time) == (start, end)
    assert attributes(prefill)["gen_ai.usage.input_tokens"] == 7
    assert attributes(prefill)["gen_ai.usage.cache_read.input_tokens"] == 3
    assert attributes(decode)["gen_ai.usage.output_tokens"] == 9


def test_a_text_that_failed_has_parts_without_tokens_and_one_without_output_has_none(
    tracer: Tracer, spans: InMemorySpanExporter
) -> None:
    worker = WorkerTraces(tracer, "chat", "smollm", GENERATE, "w-1")

    worker.record_job(Job("a" * 32, TRACE, "", True, 1, STAGES, 0.0, Ending("model_failed", 7), 1_040))
    worker.record_job(Job("b" * 32, TRACE, "", True, 1, STAGES, 0.0, Ending("model_failed", 7)))

    *parts, _, alone = spans.get_finished_spans()
    assert [part.name for part in parts] == ["prefill chat", "decode chat"]
    assert all("gen_ai" not in name for part in parts for name in attributes(part))
    assert alone.name == "job chat"


def test_an_operation_without_conventions_has_no_attributes_of_them(
    tracer: Tracer, spans: InMemorySpanExporter
) -> None:
    worker = WorkerTraces(tracer, "copy", "", ECHO, "w-1")

    worker.record_job(Job("a" * 32, TRACE, "", True, 1, STAGES, 0.0, Ending("model_failed")))

    found = attributes(the_only(spans))
    assert not [name for name in found if name.startswith("gen_ai")]
    assert found["error.type"] == "model_failed"


def test_a_fault_of_a_sampler_costs_no_job(monkeypatch: pytest.MonkeyPatch, tracer: Tracer) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(tracer, "start_span", fail)

    assert start_call(tracer, Call("embed", "embeddings", "m", "normal", 1, "c")) is None
    assert WorkerTraces(tracer, "embed", "m", EMBED, "w").record_batch(Batch([TRACE], 1, 1, 1, 0.1)) is None


# -- on and off ----------------------------------------------------------------------------------------------------


PROGRAM = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from millstream.telemetry.traces import Tracing
tracings = [Tracing("on"), Tracing("auto"), Tracing("off")]
print([each.tracer() is not None for each in tracings])
trace.set_tracer_provider(TracerProvider())
print([each.tracer() is not None for each in tracings])
"""


def test_calls_are_traced_only_if_the_program_has_set_opentelemetry_up() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.splitlines() == ["[False, False, False]", "[True, True, False]"]


def test_a_call_that_is_not_sampled_says_so_to_its_worker() -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)

    span = start_call(provider.get_tracer("tests"), Call("embed", "", "m", "normal", 1, "c"))

    assert span
    assert traces.sampled(span.traceparent) is None


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}


@pytest.mark.parametrize(
    ("environ", "exports"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/v1/traces"}, True),
        ({"MILLSTREAM_TELEMETRY__TRACES": "on"}, True),
        (ENDPOINT | {"MILLSTREAM_TELEMETRY__TRACES": "off"}, False),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, False),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_a_worker_exports_if_an_endpoint_is_set_or_traces_are_on(environ: Mapping[str, str], exports: bool) -> None:
    assert trace_export._exports(telemetry_of(environ), environ) == exports


def test_what_is_missing_is_an_error_if_traces_are_on_and_a_warning_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (traces, trace_export):
        monkeypatch.setattr(module, "is_installed", lambda: False)
    wanted = TelemetrySettings(traces="on")

    with pytest.raises(ConfigError, match=r"OpenTelemetry is not installed .*millstream\[otel\]"):
        traces.check("on")
    with pytest.raises(ConfigError, match="not installed"), trace_export.exporting(wanted, ENDPOINT, "w"):
        pass
    with trace_export.exporting(TelemetrySettings(), ENDPOINT, "w"):
        pass

    assert "no traces: OTEL_EXPORTER_OTLP_ENDPOINT is set" in caplog.text


def test_another_protocol_is_an_error_if_traces_are_on() -> None:
    environ = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}

    with pytest.raises(ConfigError, match="ask for grpc"):
        trace_export._exports(TelemetrySettings(traces="on"), environ)
