"""The section `telemetry` of config.yaml: logs and traces of the processes of one host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

from millstream.broker.config.fields import AlsoAccepts, Settings
from millstream.broker.config.variables import DEBUG_VARIABLE
from millstream.broker.config.yaml import PREFIX

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own variable for the collector that spans are sent to."""


def _on_or_off(value: object) -> object:
    # YAML 1.1 reads `on` and `off` as true and false.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _endpoint(url: str | None) -> str | None:
    """Returns the URL. The error does not quote it, since it may hold a password."""
    if url is None or not url.strip():
        return None
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be the URL of a collector, as in http://localhost:4318")
    return url.strip()


Traces = Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off), AlsoAccepts([{"type": "boolean"}])]
Endpoint = Annotated[str | None, AfterValidator(_endpoint)]


def _variable(key: str) -> str:
    return f"{PREFIX}TELEMETRY__{key.upper()}"


class TelemetrySettings(Settings):
    """Logs and traces. `traces` auto: clients trace if the program has set OpenTelemetry up, workers if an endpoint is
    set; `otlp_endpoint` None takes OTEL_EXPORTER_OTLP_ENDPOINT.
    """

    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    traces: Traces = "auto"
    otlp_endpoint: Endpoint = None

    def with_options(self, log_format: LogFormat | None, log_level: LogLevel | None) -> TelemetrySettings:
        """Returns a copy with the options of a command, if they are given."""
        chosen = {"log_format": log_format, "log_level": log_level}
        return self.model_copy(update={name: value for name, value in chosen.items() if value is not None})

    def under(self, environ: Mapping[str, str]) -> TelemetrySettings:
        """Returns a copy with log level debug if MILLSTREAM_DEBUG is set and no variable gives the level."""
        is_debug = environ.get(DEBUG_VARIABLE) and not environ.get(_variable("log_level"))
        return self.model_copy(update={"log_level": "debug"}) if is_debug else self

    def variables(self) -> dict[str, str]:
        """Returns the environment variables that give a child process these settings.

        An argument would show a password in the endpoint to all users.
        """
        named = {_variable(key): str(getattr(self, key)) for key in ("log_format", "log_level", "traces")}
        return named | ({ENDPOINT_VARIABLE: self.otlp_endpoint} if self.otlp_endpoint else {})
