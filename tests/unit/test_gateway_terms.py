"""Terms of a request's call: what headers and fields say, and which of them wins."""

from __future__ import annotations

from typing import Any

import pytest

from millstream.broker.contract.errors import InvalidRequest
from millstream.gateway.api.errors import Refusal
from millstream.gateway.api.keys import LOCAL, Key
from millstream.gateway.api.terms import read_idempotency_key, take_terms

BATCH_ONLY = Key(name="cheap", sha256="0" * 64, highest_priority="batch", tenant="acme")


@pytest.mark.parametrize(
    ("headers", "body", "priority"),
    [
        ({}, {}, "normal"),
        ({"x-priority": "batch"}, {}, "batch"),
        ({"x-priority": "batch"}, {"priority": "realtime"}, "realtime"),
        ({"x-priority": "batch"}, {"priority": 0}, "realtime"),
        ({"x-priority": "0"}, {}, "realtime"),
        ({}, {"priority": 1}, "normal"),
        ({}, {"priority": 499}, "normal"),
        ({}, {"priority": 500}, "batch"),
    ],
)
def test_the_body_wins_over_the_header_and_0_is_the_most_urgent(
    headers: dict[str, str], body: dict[str, Any], priority: str
) -> None:
    assert take_terms(headers, body, LOCAL).priority == priority
    assert body == {}


@pytest.mark.parametrize(
    ("headers", "body", "timeout"),
    [
        ({}, {}, None),
        ({"x-stainless-read-timeout": "600"}, {}, 599.0),
        ({"x-stainless-read-timeout": "1"}, {}, 0.5),
        ({"x-stainless-read-timeout": "None"}, {}, None),
        # It limits the time between two pieces.
        ({"x-stainless-read-timeout": "600"}, {"stream": True}, None),
        ({"x-stainless-read-timeout": "600", "x-timeout": "5"}, {}, 5.0),
        ({"x-timeout": "5"}, {"timeout": 2.5, "stream": True}, 2.5),
    ],
)
def test_the_deadline_is_the_requests_or_just_before_its_caller_gives_up(
    headers: dict[str, str], body: dict[str, Any], timeout: float | None
) -> None:
    assert take_terms(headers, body, LOCAL).timeout == timeout


@pytest.mark.parametrize(
    "body",
    [
        {"priority": "soon"},
        {"priority": -1},
        {"priority": True},
        {"priority": 1.5},
        {"timeout": 0},
        {"timeout": "nan"},
        {"timeout": [1]},
        {"version": 1},
        {"sticky_key": {}},
    ],
    ids=str,
)
def test_terms_that_are_not_valid_are_named(body: dict[str, Any]) -> None:
    (name,) = body

    with pytest.raises(InvalidRequest, match=f"^{'version' if name == 'sticky_key' else name}"):
        take_terms({}, body, LOCAL)


def test_a_key_gives_its_tenant_and_bounds_the_priority() -> None:
    opts = take_terms({}, {"user": "ada"}, BATCH_ONLY)

    assert (opts.priority, opts.tenant, opts.sticky_key, opts.wait) == ("batch", "acme", "ada", False)
    with pytest.raises(Refusal, match="no priority above batch"):
        take_terms({}, {"priority": "normal"}, BATCH_ONLY)


def test_idempotency_keys_of_two_api_keys_differ() -> None:
    headers = {"idempotency-key": "once"}

    assert read_idempotency_key({}, LOCAL) is None
    assert read_idempotency_key(headers, LOCAL) != read_idempotency_key(headers, BATCH_ONLY)
    for wrong in ("", "a b", "x" * 256, "ü"):
        with pytest.raises(InvalidRequest, match="Idempotency-Key"):
            read_idempotency_key({"idempotency-key": wrong}, LOCAL)
