"""config.yaml: loading it, and saying what it asks for that is not enforced yet.

Precedence of a value: environment > file > preset > default of the model's type > default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from pydantic import Field

from millstream.broker.config import yaml as config_yaml
from millstream.broker.config.check import ConfigFile, check
from millstream.broker.config.spec import ModelSpec, RedisSettings, Runtime, ServiceSpec, Settings
from millstream.broker.config.yaml import KeyPath, Place
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.scalars import plain

__all__ = ["Config", "ModelSpec", "RedisSettings", "Runtime", "ServiceSpec", "load", "unenforced"]

DEFAULT_PATH = Path("config.yaml")


class Config(Settings):
    """A checked configuration. `places` says where each value that somebody wrote was written."""

    models: dict[str, ModelSpec]
    services: dict[str, ServiceSpec]
    redis: RedisSettings
    places: dict[KeyPath, Place] = Field(default_factory=dict, repr=False)


def load(path: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration in `path`, by default ./config.yaml, with the variables of `environ` over it.

    Raises ConfigError; its message has one line for each thing that is wrong: place, key, reason, fix.
    """
    document = config_yaml.read(Path(path or DEFAULT_PATH))
    config_yaml.overlay(document, environ)
    file = check(document)
    if document.problems:
        raise ConfigError("\n".join(map(str, sorted(document.problems))))
    return Config(models=file.models, services=_resolved(file), redis=file.redis, places=document.places)


def given_service(name: str, limits: Mapping[str, object]) -> ServiceSpec:
    """The service that a program serves with code of its own; `limits` are those of `runtime`. Raises ConfigError."""
    place = Place(f"serve {name!r}")
    runtime = {key: plain(value) for key, value in limits.items()}
    tree: dict[str, object] = {
        "models": {name: {"type": "custom", "handler": "given:code"}},
        "services": {name: {"model": name, "runtime": runtime}},
    }
    document = config_yaml.Document(place.source, tree, {(): place})
    file = check(document)
    if document.problems:
        raise ConfigError("\n".join(map(str, sorted(document.problems))))
    return _resolved(file)[name].with_handler(None)


def _resolved(file: ConfigFile) -> dict[str, ServiceSpec]:
    return {
        name: ServiceSpec(
            name=name,
            model=file.models[entry.model],
            model_ref=entry.model,
            runtime=entry.runtime,
            result_ttl=file.redis.result_ttl,
            replicated=file.redis.durability == "replicated",
        )
        for name, entry in file.services.items()
    }


_NOT_ENFORCED: Mapping[str, frozenset[str]] = {
    "models": frozenset({"warmup", "priority"}),
    "services": frozenset({"memory_limit"}),
    "redis": frozenset(),
}
_TYPES_WITHOUT_WORKER = frozenset({"llm"})


def unenforced(config: Config) -> list[str]:
    """One line for each key that somebody set and nothing enforces yet, naming every place that sets it."""
    found = sorted(_unenforced(config), key=lambda each: each[0])
    lines = []
    for reason, group in groupby(found, key=lambda each: each[0]):
        places = ", ".join(f"{place} {owner}".rstrip() for _, place, owner in group)
        lines.append(f"{reason} ({places})")
    return lines


def _unenforced(config: Config) -> Iterator[tuple[str, Place, str]]:
    """What is not enforced, where it stands, and the model or service it belongs to."""
    for name, model in config.models.items():
        yield from _set_keys(config, "models", ("models", name), model)
        place = config.places.get(("models", name, "type"))
        if place and model.type in _TYPES_WITHOUT_WORKER:
            yield f"models of type {model.type} have no worker yet", place, name
    for name, service in config.services.items():
        path = ("services", name, "runtime")
        yield from _set_keys(config, "services", path, service.runtime)
    yield from _set_keys(config, "redis", ("redis",), config.redis)


def _set_keys(config: Config, section: str, path: KeyPath, values: Settings) -> Iterator[tuple[str, Place, str]]:
    for key in _NOT_ENFORCED[section]:
        default = type(values).model_fields[key].get_default(call_default_factory=True)
        place = config.places.get((*path, key))
        if place and getattr(values, key) != default:
            yield f"{key} is accepted, but not enforced yet", place, ".".join(path[1:2])
