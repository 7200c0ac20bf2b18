"""Resolves a configuration to single values, each with its origin: a variable, a file's line, a preset or a default."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from millstream.broker.config.data_dir import default_data_dir
from millstream.broker.config.fields import Settings
from millstream.broker.config.load import Config
from millstream.broker.config.spec import PRESETS, ServiceSpec
from millstream.broker.config.variables import DATA_DIR_VARIABLE, URL_VARIABLE
from millstream.broker.config.yaml import KeyPath


@dataclass(frozen=True, slots=True)
class Value:
    """One resolved value, in plain JSON types.

    `origin` is the name of a variable, file:line, "preset NAME", "default of type TYPE" or "default".
    """

    path: KeyPath
    value: object
    origin: str


def resolved(config: Config, environ: Mapping[str, str] = os.environ) -> Iterator[Value]:
    """Yields every value, in the order and under the keys of a file. A file of them loads as an equal configuration."""
    for name, model in config.models.items():
        yield from _values(config, ("models", name), model)
    for name, service in config.services.items():
        yield _value(config, ("services", name), ("model",), service.model_ref)
        yield from _runtime(config, name, service)
    for name, route in config.routes.items():
        yield from _values(config, ("services", name, "route"), route)
    for name, pool in config.pools.items():
        yield from _values(config, ("pools", name), pool)
    for each in _values(config, ("redis",), config.redis):
        yield _override(each, environ)
    yield from _values(config, ("telemetry",), config.telemetry)
    yield from _values(config, ("webhooks",), config.webhooks)


def _runtime(config: Config, name: str, service: ServiceSpec) -> Iterator[Value]:
    preset = service.runtime.preset
    by_preset = PRESETS.get(preset or "", {})
    by_type = service.model.operation.defaults
    for each in _values(config, ("services", name, "runtime"), service.runtime):
        key = each.path[3]
        if each.origin == "default" and key in by_preset:
            yield Value(each.path, each.value, f"preset {preset}")
        elif each.origin == "default" and key in by_type:
            yield Value(each.path, each.value, f"default of type {service.model.type}")
        else:
            yield each


def _values(config: Config, section: KeyPath, settings: Settings) -> Iterator[Value]:
    for key in type(settings).model_fields:
        yield from _leaves(config, section, (key,), getattr(settings, key))


def _leaves(config: Config, section: KeyPath, keys: KeyPath, value: object) -> Iterator[Value]:
    """Yields the single values under `keys` of `section`. If the value is a mapping, only keys that are set count."""
    if isinstance(value, Settings):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(config, section, (*keys, key), below)
    else:
        yield _value(config, section, keys, value)


def _value(config: Config, section: KeyPath, keys: KeyPath, value: object) -> Value:
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, os.PathLike) else value
    # The value may come from a key above it: `rate_limit: 5` sets rate_limit.requests, which the file does not name.
    places = (config.places.get((*section, *keys[:length])) for length in range(len(keys), 0, -1))
    return Value((*section, *keys), plain, str(next(filter(None, places), "default")))


def _override(each: Value, environ: Mapping[str, str]) -> Value:
    """Returns the value that commands use: MILLSTREAM_REDIS_URL and MILLSTREAM_DATA_DIR override the configuration."""
    if each.path == ("redis", "url") and environ.get(URL_VARIABLE):
        return Value(each.path, environ[URL_VARIABLE], URL_VARIABLE)
    if each.path == ("redis", "data_dir") and (environ.get(DATA_DIR_VARIABLE) or each.value is None):
        origin = DATA_DIR_VARIABLE if environ.get(DATA_DIR_VARIABLE) else each.origin
        return Value(each.path, str(default_data_dir(environ)), origin)
    return each
