"""Why a value of config.yaml is wrong, in a sentence that says how to mend it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from millstream.broker.config.file import ConfigFile, Entry
from millstream.broker.config.pools import Pool
from millstream.broker.config.rate_limit import RateLimit
from millstream.broker.config.route import Route, Version
from millstream.broker.config.spec import ModelSpec, PriorityLimits, RedisSettings, Runtime
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.config.webhooks import WebhookSettings
from millstream.broker.config.yaml import Document, KeyPath
from millstream.broker.contract.errors import did_you_mean
from millstream.broker.contract.operations import OPERATIONS

_REASONS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping",
    "path_type": "must be a path",
    "string_type": "must be text; put it in quotes",
    "value_error": "{error}",
}
"""Our message for each of pydantic's error types."""

_MISSING_OF_POOLS = {
    "device": "missing; name the device, as in cuda:0 or cpu",
    "services": "missing; name the services whose models the pool loads, as in [embed, chat]",
}


def reason_of(error: ErrorDetails, path: KeyPath, document: Document) -> str:
    """Returns what is wrong with the value at `path` of `document`."""
    if error["type"] == "extra_forbidden":
        return f"unknown key; {_fix_for_key(path)}"
    if error["type"] == "missing" and path[-1] == "versions":
        return "missing; name the versions with their weights, as in {v1: 90, v2: 10}"
    if error["type"] == "missing" and path[0] == "pools":
        return _MISSING_OF_POOLS[path[-1]]
    if error["type"] == "missing":
        return f"missing; name one of: {', '.join(OPERATIONS)}"
    context = error.get("ctx", {})
    reason = _REASONS.get(error["type"], error["msg"]).format(**context)
    close = did_you_mean(str(error["input"]), re.findall(r"'([\w-]+)'", str(context.get("expected", ""))))
    # A value under redis and the URL of a server may hold a password, so they are not quoted.
    is_quoted = path[0] not in ("redis", "webhooks") and path[-1] not in ("url", "otlp_endpoint")
    actual = f", not {_as_written(error['input'], document.written.get(path))}" if is_quoted else ""
    return reason + actual + (f"; did you mean {close}?" if close else "")


def _as_written(value: object, written: str | None) -> str:
    """Returns a value as the file spells it: YAML reads `on` as True and 2026-01-01 as a date."""
    text = "nothing" if value is None else repr(value) if written is None else written
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fix_for_key(path: KeyPath) -> str:
    known = _known_keys(path[:-1])
    if close := did_you_mean(path[-1], known):
        return f"did you mean {close}?"
    if len(path) == 3 and path[0] == "services" and path[-1] in Runtime.model_fields:
        return f"did you mean runtime.{path[-1]}?"
    return f"known are: {', '.join(known)}"


_SECTIONS: Mapping[KeyPath, type[BaseModel]] = {
    (): ConfigFile,
    ("models", "*"): ModelSpec,
    ("services", "*"): Entry,
    ("services", "*", "route"): Route,
    ("services", "*", "route", "versions", "*"): Version,
    ("services", "*", "runtime"): Runtime,
    ("services", "*", "runtime", "rate_limit"): RateLimit,
    ("services", "*", "runtime", "priorities", "*"): PriorityLimits,
    ("pools", "*"): Pool,
    ("telemetry",): TelemetrySettings,
    ("webhooks",): WebhookSettings,
    ("redis",): RedisSettings,
}
"""The sections of a file; "*" is any name."""


def _known_keys(path: KeyPath) -> list[str]:
    """Returns the keys that are allowed under `path`."""
    (section,) = [
        each
        for pattern, each in _SECTIONS.items()
        if len(pattern) == len(path) and all(key in ("*", name) for key, name in zip(pattern, path, strict=True))
    ]
    return list(section.model_fields)
