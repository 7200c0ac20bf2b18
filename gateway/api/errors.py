"""Errors as HTTP answers, in the shape of the API that the request belongs to. Pure but for the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    QueueFull,
    RateLimited,
    UnknownService,
)
from millstream.broker.contract.job import Json
from millstream.client.openai.failures import body_of, status_of

log = logging.getLogger(__name__)

MOST_RETRY_S = 120
"""Seconds of Retry-After at most: OpenAI's client libraries do not retry at all after more."""

CLIENT_GONE = 499
"""Status, as proxies log it, of a request whose caller left."""

_SERVER_FAULT, _RETRIED = 500, (429, 503)


class Refusal(Exception):
    """A request that HTTP refuses, before it is a call. `code` is in OpenAI's shape; `retry_after` in seconds."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after = param, retry_after


class Problem(NamedTuple):
    """An error as all shapes write it. `type`, `param` and `code` are those of OpenAI's shape."""

    status: int
    message: str
    type: str
    param: str | None
    code: str
    headers: Mapping[str, str]
    cause: Exception


def problem_of(error: Exception) -> Problem:
    """Returns what the caller learns of an error. It names no host, and no service that the caller did not name."""
    if isinstance(error, Refusal):
        kind = "server_error" if error.status >= _SERVER_FAULT else _REFUSALS.get(error.status, "invalid_request_error")
        headers = _retry_headers(error.status, error.retry_after, error.status in _RETRIED)
        return Problem(error.status, error.message, kind, error.param, error.code, headers, error)
    if not isinstance(error, MillstreamError):
        error = MillstreamError("internal error: the log of the gateway has the details")
    status, shown = status_of(error), _public(error)
    found = body_of(shown)["error"]
    assert isinstance(found, dict)
    headers = _retry_headers(status, error.retry_after, error.retryable and not isinstance(error, DeadlineExceeded))
    param = found["param"] if isinstance(found["param"], str) else None
    return Problem(status, str(found["message"]), str(found["type"]), param, str(found["code"]), headers, error)


_REFUSALS: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Types of refusals in OpenAI's shape."""


def _public(error: MillstreamError) -> MillstreamError:
    if isinstance(error, BrokerUnavailable):
        return BrokerUnavailable("the queue's server cannot be reached", hint="try again later")
    if isinstance(error, UnknownService):
        return UnknownService("no such model, or this key may not call it", hint="GET /v1/models lists the models")
    return error


def _retry_headers(status: int, retry_after: float | None, repeat: bool) -> Mapping[str, str]:
    """Returns the headers that tell a client library whether and when to try again."""
    headers = {"x-should-retry": "true" if repeat else "false"}
    if status in _RETRIED:
        seconds = min(max(retry_after or 1.0, 0.001), MOST_RETRY_S)
        headers |= {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
    return headers


# -- shapes ----------------------------------------------------------------------------------------------------------


def write_openai(problem: Problem) -> dict[str, Json]:
    """Returns the body in OpenAI's shape, which Jina's rerank and our own routes have, too."""
    error: Json = {"message": problem.message, "type": problem.type, "param": problem.param, "code": problem.code}
    return {"error": error}


def write_cohere(problem: Problem) -> dict[str, Json]:
    """Returns the body in Cohere's shape. `code` is ours."""
    return {"message": problem.message, "code": problem.code}


def write_tei(problem: Problem) -> dict[str, Json]:
    """Returns the body in the shape of Text Embeddings Inference."""
    return {"error": problem.message, "error_type": _tei_type(problem)}


_TEI_TYPES: Mapping[type[Exception], str] = {
    InputTooLong: "Validation",
    InvalidRequest: "Validation",
    QueueFull: "Overloaded",
    RateLimited: "Overloaded",
    ModelFailed: "Backend",
    BrokerUnavailable: "Unhealthy",
}


def _tei_type(problem: Problem) -> str:
    known = (_TEI_TYPES[each] for each in type(problem.cause).__mro__ if each in _TEI_TYPES)
    return next(known, "Backend" if problem.status >= _SERVER_FAULT else "Validation")


_TEI_STATUSES: Mapping[type[Exception], int] = {InputTooLong: 413, InvalidRequest: 422, ModelFailed: 424}


def _tei_status(problem: Problem) -> int:
    known = (_TEI_STATUSES[each] for each in type(problem.cause).__mro__ if each in _TEI_STATUSES)
    return next(known, problem.status)


class Shape(NamedTuple):
    """How a family of routes writes its errors."""

    write: Callable[[Problem], dict[str, Json]]
    status: Callable[[Problem], int]


OPENAI = Shape(write_openai, lambda problem: problem.status)
COHERE = Shape(write_cohere, lambda problem: problem.status)
TEI = Shape(write_tei, _tei_status)

_SHAPES: Mapping[str, Shape] = {"/v2/": COHERE, "/tei/": TEI, "/embed": TEI, "/rerank": TEI, "/info": TEI}
"""Shapes by the begin of a path."""


def shape_of(path: str) -> Shape:
    """Returns the shape of the errors of a path."""
    return next((shape for start, shape in _SHAPES.items() if path.startswith(start)), OPENAI)


def note(problem: Problem, path: str, request_id: str) -> None:
    """Writes a line to the log if the error is not its caller's fault."""
    if problem.status >= _SERVER_FAULT:
        log.warning("%s of request %s failed with %s: %s", path, request_id, problem.status, problem.cause)
