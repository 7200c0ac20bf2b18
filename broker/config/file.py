"""The shape of config.yaml: its sections, and a service as it is written there."""

from __future__ import annotations

from pydantic import Field

from millstream.broker.config.fields import Section, ServiceName, Settings
from millstream.broker.config.pools import Pool
from millstream.broker.config.route import OptionalRoute
from millstream.broker.config.spec import ModelSpec, RedisSettings, Runtime
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.config.webhooks import WebhookSettings


class Entry(Settings):
    """A service as it is written in the file: `model` is the name of an entry under `models`.

    An entry with `route` sends calls to other services. It may have a model, too: that service is one of its versions.
    """

    model: str | None = None
    runtime: Section[Runtime]
    route: OptionalRoute = None


class ConfigFile(Settings):
    """The whole file."""

    models: Section[dict[str, ModelSpec]] = Field(default_factory=dict)
    services: Section[dict[ServiceName, Entry]] = Field(default_factory=dict)
    pools: Section[dict[str, Pool]] = Field(default_factory=dict)
    redis: Section[RedisSettings] = RedisSettings()
    telemetry: Section[TelemetrySettings] = TelemetrySettings()
    webhooks: Section[WebhookSettings] = WebhookSettings()
