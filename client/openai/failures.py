"""Errors as OpenAI's API has them: the HTTP status, and the object of the body. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    NoWorkers,
    QueueFull,
    RateLimited,
    ServicePaused,
    UnknownService,
    to_wire,
)
from millstream.broker.contract.job import Json
from millstream.client.openai.fields import TOKEN_IDS

SERVER_FAULT = 500

_STATUSES: Mapping[type[MillstreamError], int] = MappingProxyType(
    {
        InvalidRequest: 400,
        UnknownService: 404,
        QueueFull: 429,
        RateLimited: 429,
        ServicePaused: 503,
        NoWorkers: 503,
        BrokerUnavailable: 503,
        DeadlineExceeded: 504,
    }
)

_TYPES: Mapping[int, str] = MappingProxyType(
    {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
)

_CODES: Mapping[type[MillstreamError], str] = MappingProxyType(
    {UnknownService: "model_not_found", InputTooLong: "context_length_exceeded"}
)
"""Codes that programs written for OpenAI's API look for. All others are our own."""

_FIELD = re.compile(r"([a-z_]+)(?:\[\d+\])?[:=]")
"""Begin of the message about a field or an option."""


def status_of(error: MillstreamError) -> int:
    """Returns the HTTP status of an error."""
    return next((_STATUSES[each] for each in type(error).__mro__ if each in _STATUSES), SERVER_FAULT)


def body_of(error: MillstreamError) -> dict[str, Json]:
    """Returns the body of an answer that says the error: {"error": {message, type, param, code}}."""
    wire, status = to_wire(error), status_of(error)
    message = f"{wire['message']} ({wire['hint']})" if wire["hint"] else str(wire["message"])
    kind = _TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": _param_of(error), "code": _code_of(error)}}


def _code_of(error: MillstreamError) -> str:
    if TOKEN_IDS in error.message:
        return "token_ids_not_supported"
    return _CODES.get(type(error), error.code)


def _param_of(error: MillstreamError) -> str | None:
    """Returns the field that is at fault, if the error's message begins with its name."""
    if isinstance(error, UnknownService):
        return "model"
    found = _FIELD.match(error.message) if isinstance(error, InvalidRequest) else None
    return found[1] if found else None
