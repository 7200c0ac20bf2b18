"""Export of a worker's spans, by OTLP over HTTP. Clients export none: their programs have an exporter of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING

from millstream.broker.config.telemetry import ENDPOINT_VARIABLE, TelemetrySettings
from millstream.broker.contract.errors import ConfigError
from millstream.telemetry.traces import SYSTEM, check, is_installed

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

ENDPOINT_VARIABLES = (ENDPOINT_VARIABLE, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"

FLUSH_S = 2.0
"""Seconds that the end of a worker waits at most for a collector that does not answer."""


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
