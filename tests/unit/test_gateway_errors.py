"""Errors over HTTP: the status, the headers for client libraries that retry, and the shape of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    NoWorkers,
    QueueFull,
    RateLimited,
    StreamDiverged,
    UnknownService,
    WorkerLost,
)
from millstream.gateway.api.errors import Refusal, problem_of, shape_of

SECRET = "redis://queue-host:6379"


@pytest.mark.parametrize(
    ("error", "status", "repeat", "retry_after"),
    [
        (QueueFull("full", retry_after=2.1), 429, "true", "3"),
        (QueueFull("full", retry_after=5_000.0), 429, "true", "120"),
        (RateLimited("used up", retry_after=0.2), 429, "true", "1"),
        (BrokerUnavailable(SECRET), 503, "true", "1"),
        (NoWorkers("none"), 503, "true", "1"),
        (DeadlineExceeded("late"), 504, "false", None),
        (ModelFailed("a stone"), 500, "false", None),
        (WorkerLost("died"), 500, "false", None),
        (StreamDiverged("other text"), 500, "false", None),
        (InvalidRequest("input: no"), 400, "false", None),
        (Refusal(503, "overloaded", "full", retry_after=1.0), 503, "true", "1"),
        (Refusal(401, "invalid_api_key", "no key"), 401, "false", None),
        (ZeroDivisionError(SECRET), 500, "false", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_says_whether_and_when_to_try_again(
    error: Exception, status: int, repeat: str, retry_after: str | None
) -> None:
    problem = problem_of(error)

    assert (problem.status, problem.headers["x-should-retry"]) == (status, repeat)
    assert problem.headers.get("retry-after") == retry_after
    assert ("retry-after-ms" in problem.headers) == (retry_after is not None)


def test_the_time_to_retry_is_exact_in_milliseconds() -> None:
    assert problem_of(RateLimited("used up", retry_after=0.2)).headers["retry-after-ms"] == "200"


@pytest.mark.parametrize(
    "error",
    [BrokerUnavailable(SECRET), UnknownService(f"none on {SECRET}", did_you_mean="secret-model"), OSError(SECRET)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_names_neither_hosts_nor_services_of_others(error: Exception) -> None:
    for path in ("/v1/embeddings", "/v2/embed", "/embed"):
        text = str(shape_of(path).write(problem_of(error)))

        assert "queue-host" not in text
        assert "secret-model" not in text


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputTooLong("long"), 413, "Validation"),
        (InvalidRequest("no"), 422, "Validation"),
        (QueueFull("full"), 429, "Overloaded"),
        (ModelFailed("a stone"), 424, "Backend"),
        (BrokerUnavailable("away"), 503, "Unhealthy"),
        (DeadlineExceeded("late"), 504, "Backend"),
        (Refusal(413, "request_too_large", "large"), 413, "Validation"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_tei_s_errors_have_its_statuses_and_types(error: Exception, status: int, kind: str) -> None:
    shape, problem = shape_of("/tei/docs/rerank"), problem_of(error)

    body: Any = shape.write(problem)
    assert (shape.status(problem), body["error_type"]) == (status, kind)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/rerank", {"error"}),
        ("/v2/rerank", {"message", "code"}),
        ("/rerank", {"error", "error_type"}),
        ("/healthz", {"error"}),
    ],
)
def test_each_family_has_its_shape(path: str, fields: set[str]) -> None:
    assert set(shape_of(path).write(problem_of(MillstreamError("no")))) == fields


def test_only_one_module_makes_calls() -> None:
    """A route that made its own call could forget the caller who leaves."""
    folder = Path(__file__).parents[2] / "gateway" / "api"

    makers = {file.name for file in folder.glob("*.py") if "calls.start(" in file.read_text(encoding="utf-8")}
    assert makers == {"calling.py"}
