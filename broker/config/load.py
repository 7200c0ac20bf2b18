"""Loads config.yaml, and lists the settings in it that are not enforced yet.

Precedence of a value, highest first: environment, file, preset, default of the model's type, default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from pydantic import Field

from millstream.broker.config import yaml as config_yaml
from millstream.broker.config.check import check
from millstream.broker.config.fields import Settings
from millstream.broker.config.file import ConfigFile
from millstream.broker.config.pools import Pool
from millstream.broker.config.route import Route, RouteSpec
from millstream.broker.config.spec import ModelSpec, RedisSettings, Runtime, ServiceSpec
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.config.webhooks import WebhookSettings
from millstream.broker.config.yaml import PREFIX, KeyPath, Place
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.operations import CALL
from millstream.broker.contract.scalars import plain

__all__ = ["Config", "ModelSpec", "RedisSettings", "Runtime", "ServiceSpec", "load", "unenforced"]

DEFAULT_PATH = Path("config.yaml")


class Config(Settings):
    """A checked configuration. `places` has the place of each value that the file or a variable sets.

    `services` are those that have a model.
    """

    models: dict[str, ModelSpec]
    services: dict[str, ServiceSpec]
    routes: dict[str, Route] = Field(default_factory=dict)
    pools: dict[str, Pool] = Field(default_factory=dict)
    redis: RedisSettings
    telemetry: TelemetrySettings = TelemetrySettings()
    webhooks: WebhookSettings = WebhookSettings()
    places: dict[KeyPath, Place] = Field(default_factory=dict, repr=False)

    @property
    def route_specs(self) -> list[RouteSpec]:
        """The routes with every default filled in."""
        return [
            route.resolve(name, self.services[route.service_of(name, next(iter(route.versions)))].model.operation)
            for name, route in self.routes.items()
        ]


def load(path: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Returns the configuration in `path`, by default ./config.yaml. Variables in `environ` override its values.

    Raises ConfigError if anything is wrong; its message has one line for each problem: place, key, reason, fix.
    """
    document = config_yaml.read(Path(path or DEFAULT_PATH))
    config_yaml.overlay(document, environ)
    file = check(document)
    if document.problems:
        raise ConfigError("\n".join(map(str, sorted(document.problems))))
    return Config(
        models=file.models,
        services=_resolve(file),
        routes={name: entry.route for name, entry in file.services.items() if entry.route},
        pools=file.pools,
        redis=file.redis,
        telemetry=file.telemetry,
        webhooks=file.webhooks,
        places=document.places,
    )


def telemetry_of(environ: Mapping[str, str]) -> TelemetrySettings:
    """Returns the settings of `telemetry` that variables give, for a process without a file. Raises ConfigError."""
    document = config_yaml.Document("the environment")
    section = f"{PREFIX}TELEMETRY__"
    named = {name: value for name, value in environ.items() if name.upper().startswith(section)}
    config_yaml.overlay(document, named)
    file = check(document)
    if document.problems:
        raise ConfigError("\n".join(map(str, sorted(document.problems))))
    return file.telemetry


def given_service(name: str, limits: Mapping[str, object]) -> ServiceSpec:
    """Returns the spec of a service whose code is in the calling program.

    `limits` has the keys of `runtime`. Raises ConfigError if one is unknown or invalid.
    """
    place = Place(f"serve {name!r}")
    runtime = {key: plain(value) for key, value in limits.items()}
    tree: dict[str, object] = {
        "models": {name: {"type": CALL.type, "handler": "given:code"}},
        "services": {name: {"model": name, "runtime": runtime}},
    }
    document = config_yaml.Document(place.source, tree, {(): place})
    file = check(document)
    if document.problems:
        raise ConfigError("\n".join(map(str, sorted(document.problems))))
    return _resolve(file)[name].with_handler(None)


def _resolve(file: ConfigFile) -> dict[str, ServiceSpec]:
    return {
        name: ServiceSpec(
            name=name,
            model=file.models[entry.model],
            model_ref=entry.model,
            runtime=entry.runtime,
            result_ttl=file.redis.result_ttl,
            replicated=file.redis.durability == "replicated",
            webhooks=file.webhooks.allow,
        )
        for name, entry in file.services.items()
        if entry.model is not None
    }


_NOT_ENFORCED: Mapping[str, frozenset[str]] = {
    "models": frozenset({"warmup"}),
    "services": frozenset(),
    "redis": frozenset(),
}


def unenforced(config: Config) -> list[str]:
    """Returns one line for each key that is set but not enforced yet; the line names every place that sets it."""
    found = sorted(_unenforced(config), key=lambda each: each[0])
    lines = []
    for reason, group in groupby(found, key=lambda each: each[0]):
        places = ", ".join(f"{place} {owner}".rstrip() for _, place, owner in group)
        lines.append(f"{reason} ({places})")
    return lines


def _unenforced(config: Config) -> Iterator[tuple[str, Place, str]]:
    """Yields a reason, the place of the setting, and the model or service that it belongs to."""
    for name, model in config.models.items():
        yield from _set_keys(config, "models", ("models", name), model)
        place = config.places.get(("models", name, "type"))
        if place and not model.operation.runs:
            yield f"models of type {model.type} have no worker yet", place, name
    for name, service in config.services.items():
        path = ("services", name, "runtime")
        yield from _set_keys(config, "services", path, service.runtime)
        place = config.places.get((*path, "batch_timeout"))
        if place and service.model.operation.streams:
            yield f"batch_timeout has no effect on type {service.model.type}: texts join at every step", place, name
    yield from _set_keys(config, "redis", ("redis",), config.redis)


def _set_keys(config: Config, section: str, path: KeyPath, values: Settings) -> Iterator[tuple[str, Place, str]]:
    for key in _NOT_ENFORCED[section]:
        default = type(values).model_fields[key].get_default(call_default_factory=True)
        place = config.places.get((*path, key))
        if place and getattr(values, key) != default:
            yield f"{key} is accepted, but not enforced yet", place, ".".join(path[1:2])
