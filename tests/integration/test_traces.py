"""A trace from end to end: a program's own span, its call, and the spans that a real worker process exports."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer
from support import eventually
from workers import remove, spec, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.inspector import Inspector
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.telemetry.traces import Tracing

EXAMPLE = Path(__file__).parents[2] / "docs/examples/traced_calls.py"


class Collector:
    """Takes spans by OTLP over HTTP. `status`: that of its answers."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[Mapping[str, str]] = []
        self.status = 200
        self.requests = 0

    def the_only(self, kind: str) -> Span:
        (span,) = [each for each in self.spans if each.name.split()[0] == kind]
        return span

    def add(self, body: bytes) -> None:
        self.requests += 1
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({item.key: item.value.string_value for item in each.resource.attributes})
            self.spans += [span for scope in each.scope_spans for span in scope.spans]


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.add(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(collector.status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def name(server: EmbeddedServer) -> Iterator[str]:
    made = f"test-traces-{uuid.uuid4().hex[:8]}"
    yield made
    remove(server.url, made)


def test_the_callers_trace_is_linked_in_the_batch_and_has_the_job_below_it(server: EmbeddedServer, name: str) -> None:
    with collecting() as (collector, endpoint):
        # The drain exports what is left, long before the schedule would.
        exporter = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
        with working(server.url, spec(name), variables=exporter):
            connection = Connection(server.url, name="tests")
            (worker,) = Inspector(connection).services([name])[0].workers
            connection.close()
            with Client(server.url) as untraced:
                untraced.submit(name, ["x"], timeout=60).result()
            environ = {**os.environ, **exporter, "MILLSTREAM_REDIS_URL": server.url}
            words = [sys.executable, str(EXAMPLE), name, "a b", "c"]
            subprocess.run(words, env=environ, check=True, timeout=90)

    request, call, batch, job = (collector.the_only(kind) for kind in ("request", "send", "process", "job"))
    assert (call.trace_id, call.parent_span_id) == (request.trace_id, request.span_id)
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(call.trace_id, call.span_id)]
    assert (job.trace_id, job.parent_span_id) == (call.trace_id, call.span_id)
    assert [link.span_id for link in job.links] == [batch.span_id]
    assert batch.trace_id != call.trace_id
    assert batch.start_time_unix_nano <= batch.end_time_unix_nano <= job.end_time_unix_nano + 5_000_000
    resources = {each["service.name"]: each for each in collector.resources}
    assert resources["millstream-worker"]["service.instance.id"] == worker.consumer


class Given(Tracing):
    """The tracer of a program that has set OpenTelemetry up."""

    def __init__(self) -> None:
        super().__init__("auto")
        self._given = TracerProvider(shutdown_on_exit=False).get_tracer("tests")

    def tracer(self) -> Tracer:
        return self._given


def test_a_collector_that_fails_costs_no_job_and_delays_no_drain(server: EmbeddedServer, name: str) -> None:
    with collecting() as (collector, endpoint):
        collector.status = 503
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "10"}
        with working(server.url, spec(name), variables=variables), Client(server.url) as client:
            client._calls.tracing = Given()
            assert client.submit(name, ["a"], timeout=60).result() == ["a"]
            eventually(lambda: collector.requests > 0)
            assert client.submit(name, ["b"], timeout=60).result() == ["b"]
            began = time.monotonic()
        # The exporter repeats a request for up to 10 s.
        assert time.monotonic() - began < 5.0


def test_a_text_has_its_prefill_and_its_decoding_below_its_job(server: EmbeddedServer, name: str) -> None:
    model = ModelSpec(type="echo-stream", model_name="sleep:0.02")
    speaker = ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime())
    with collecting() as (collector, endpoint):
        exporter = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
        with working(server.url, speaker, variables=exporter), Client(server.url) as client:
            client._calls.tracing = Given()
            client.submit(name, ["one two three four"], timeout=60).result()

    job, prefill, decode = (collector.the_only(kind) for kind in ("job", "prefill", "decode"))
    assert prefill.parent_span_id == decode.parent_span_id == job.span_id
    assert job.start_time_unix_nano <= prefill.start_time_unix_nano < prefill.end_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano < decode.end_time_unix_nano
    assert decode.end_time_unix_nano <= job.end_time_unix_nano
