"""Traces the calls of a program: `python traced_calls.py SERVICE TEXT...` sends texts in a span of its own.

The collector is that of OTEL_EXPORTER_OTLP_ENDPOINT, by default http://localhost:4318.
"""

from __future__ import annotations

import sys

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from millstream.client import Client


def main(service: str, texts: list[str]) -> None:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    with Client() as client, trace.get_tracer("example").start_as_current_span("request"):
        client.submit(service, texts, timeout=60).result()
    provider.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
