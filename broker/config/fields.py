"""Types of single values in config.yaml, and the base class of its sections.

A type says how a value is read, checked and described in the JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from millstream.broker.config.units import DURATION_PATTERN, SIZE_PATTERN, seconds, size
from millstream.broker.config.url import ACCEPTED, canonical, read_url

SERVICE_NAME = "[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}"
VERSION_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,31}"
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_HANDLER = re.compile(f"{_DOTTED}:{_DOTTED}")


def _optional_seconds(value: object) -> float | None:
    return None if value in (None, "none", "null") else seconds(value)


def _count(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def _tokens(value: object) -> object:
    if value == "auto":
        return value
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError('must be a whole number of at least 1, or "auto"')
    return number


def _empty_section(value: object) -> object:
    return {} if value is None else value


def _automatic(value: str) -> str | None:
    return None if value == "auto" else value


def _service_name(name: str) -> str:
    if not re.fullmatch(SERVICE_NAME, name):
        raise ValueError("a service name has 1 to 64 of A-Z a-z 0-9 _ . @ - and starts with a letter or digit")
    return name


def _version_name(name: str) -> str:
    if not re.fullmatch(VERSION_NAME, name):
        raise ValueError("a version has 1 to 32 of A-Z a-z 0-9 _ . - and starts with a letter or digit")
    return name


def _key_prefix(prefix: str) -> str:
    if not _PREFIX.fullmatch(prefix):
        raise ValueError("must be 1 to 64 of A-Z a-z 0-9 _ . : -")
    return prefix


def _redis_url(url: str | None) -> str | None:
    """Returns the URL in its canonical spelling. The error does not quote the URL, which may hold a password."""
    if url is None or not url.strip():
        return None
    try:
        read_url(url)
    except ValueError as problem:
        raise ValueError(f"no Redis URL: {problem}; {ACCEPTED}") from None
    return canonical(url)


def _upstream_url(url: str) -> str:
    """Returns the URL without a final slash. The error does not quote the URL, which may hold a key."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be the URL of an HTTP server, as in http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("must have no user, password, query or fragment: it is written to Redis; use api_key_file")
    return url.strip().rstrip("/")


def _variable(name: str) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the name of an environment variable, as in VLLM_API_KEY")
    return name


def _kernels(value: object) -> object:
    # YAML 1.1 reads `off` as false.
    return "off" if value is False else value


def _below(path: str) -> str:
    if path.startswith("/") or not {"..", ""}.isdisjoint(path.split("/")):
        raise ValueError("must be a path below the model's folder, as in onnx/model.onnx")
    return path


def _handler(name: str) -> str:
    if not _HANDLER.fullmatch(name):
        raise ValueError("must be module:function, as in my_package.my_module:process")
    return name


# Compared by identity, because typing hashes the arguments of Annotated and `accepted` has no hash.
@dataclass(frozen=True, slots=True, eq=False)
class AlsoAccepts:
    """Adds to the JSON Schema of config.yaml the values that a validator accepts besides its own type."""

    accepted: Sequence[JsonSchemaValue]

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        own = handler(core)
        return {"anyOf": [*(own["anyOf"] if set(own) == {"anyOf"} else [own]), *self.accepted]}


NO_LIMIT: JsonSchemaValue = {"enum": ["none", "null"]}
_DURATION: JsonSchemaValue = {"type": "string", "pattern": DURATION_PATTERN}
_SIZE: JsonSchemaValue = {"type": "string", "pattern": SIZE_PATTERN}

Count = Annotated[Annotated[int, Field(ge=1)], BeforeValidator(_count)]
CountOrZero = Annotated[Annotated[int, Field(ge=0)], BeforeValidator(_count)]
"""A Count, or 0."""
Rate = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)], BeforeValidator(_count)]
Duration = Annotated[Annotated[float, Field(ge=0)], BeforeValidator(seconds), AlsoAccepts([_DURATION])]
Span = Annotated[Annotated[float, Field(gt=0)], BeforeValidator(seconds), AlsoAccepts([_DURATION])]
"""A duration above zero."""
Limit = Annotated[
    Annotated[float, Field(gt=0)] | None, BeforeValidator(_optional_seconds), AlsoAccepts([_DURATION, NO_LIMIT])
]
"""A Span, or None for no limit."""
Size = Annotated[Annotated[int, Field(gt=0)], BeforeValidator(size), AlsoAccepts([_SIZE])]
OptionalDuration = Annotated[
    Annotated[float, Field(ge=0)] | None, BeforeValidator(_optional_seconds), AlsoAccepts([_DURATION, NO_LIMIT])
]
BatchTokens = Annotated[int | Literal["auto"], BeforeValidator(_tokens)]
ServiceName = Annotated[str, AfterValidator(_service_name)]
VersionName = Annotated[str, AfterValidator(_version_name)]
KeyPrefix = Annotated[str, AfterValidator(_key_prefix)]
RedisUrl = Annotated[str | None, AfterValidator(_redis_url)]
Device = Annotated[str | None, AfterValidator(_automatic)]
Kernels = Annotated[Literal["auto", "off"], BeforeValidator(_kernels), AlsoAccepts([{"const": False}])]
PathBelow = Annotated[str, AfterValidator(_below)]
"""A relative path below the model's folder."""
UpstreamUrl = Annotated[str, AfterValidator(_upstream_url)]
Variable = Annotated[str, AfterValidator(_variable)]
Handler = Annotated[str, AfterValidator(_handler)]
HomePath = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path in which `~` is the home folder."""

T = TypeVar("T")
Section = Annotated[T, BeforeValidator(_empty_section), AlsoAccepts([{"type": "null"}])]
"""A mapping. YAML gives null if all of its keys are commented out; that counts as empty."""


class Settings(BaseModel):
    """Base class of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
