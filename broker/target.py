"""Finds the server and the key prefix for a client or a command, if its caller does not give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from millstream.broker.config.load import DEFAULT_PATH, Config, load, telemetry_of
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.config.variables import PREFIX_VARIABLE, URL_VARIABLE
from millstream.broker.contract.keys import DEFAULT_PREFIX
from millstream.broker.transport import eviction
from millstream.broker.transport.connection import find_url

_SECTIONS = {"models", "services", "pools", "redis", "telemetry", "webhooks"}


@dataclass(frozen=True, slots=True)
class Target:
    """A server's URL and the prefix of its keys. `allow_eviction`: the server may delete keys if its memory is full.

    `telemetry`: how this host logs and traces.
    """

    url: str
    prefix: str
    allow_eviction: bool = False
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)


def find_target(url: str | None, prefix: str | None, environ: Mapping[str, str]) -> Target:
    """Returns the target from the arguments, else the environment, else ./config.yaml, else a local `millstream up`.

    Raises ConfigError if ./config.yaml is wrong, BrokerUnavailable if nothing names a server. If the arguments or the
    environment name the server, a ./config.yaml of another program is ignored.
    """
    named = bool(url or environ.get(URL_VARIABLE))
    config = _config(environ, needed=not named) if not (named and prefix) else None
    configured = config.redis.key_prefix if config else environ.get(PREFIX_VARIABLE) or DEFAULT_PREFIX
    telemetry = config.telemetry if config else telemetry_of(environ)
    return Target(find_url(url, config, environ), prefix or configured, eviction.allowed(config, environ), telemetry)


def find_prefix(prefix: str | None, environ: Mapping[str, str]) -> str:
    """Returns the prefix of all keys as `find_target` does, for commands that need no server. Raises ConfigError."""
    config = None if prefix else _config(environ, needed=False)
    return prefix or (config.redis.key_prefix if config else environ.get(PREFIX_VARIABLE) or DEFAULT_PREFIX)


def find_config(environ: Mapping[str, str]) -> Config | None:
    """Reads ./config.yaml; None if it does not exist or is of another program. Raises ConfigError if it is wrong."""
    return _config(environ, needed=False)


def find_telemetry(environ: Mapping[str, str]) -> TelemetrySettings:
    """Returns how this host logs and traces: by variables, else ./config.yaml. Raises ConfigError if one is wrong."""
    config = find_config(environ)
    return config.telemetry if config else telemetry_of(environ)


def _config(environ: Mapping[str, str], *, needed: bool) -> Config | None:
    if not DEFAULT_PATH.is_file() or not (needed or _is_ours(DEFAULT_PATH)):
        return None
    return load(DEFAULT_PATH, environ)


def _is_ours(path: Path) -> bool:
    """Tells if every top-level key is one of millstream's: other programs have a config.yaml, too."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(tree, dict) and bool(tree) and set(tree) <= _SECTIONS
