"""Terms of a request's call, from headers and from fields of the body: priority, deadline, version. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import get_args

from millstream.broker.config.spec import PriorityName
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.call_options import CallOptions
from millstream.gateway.api.errors import Refusal
from millstream.gateway.api.keys import Key

PRIORITY, TIMEOUT, VERSION, IDEMPOTENCY_KEY = "x-priority", "x-timeout", "x-version", "idempotency-key"
"""Names of headers. The first three are also fields of the body: "priority", "timeout", "version"."""

READ_TIMEOUT = "x-stainless-read-timeout"
"""Header of OpenAI's and Cohere's client libraries: seconds without a byte after which they give up."""

ANSWER_S = 1.0
"""Seconds that a call ends before its caller gives up, so that the caller reads why."""

_PRIORITIES: tuple[PriorityName, ...] = get_args(PriorityName)
_BATCH_FROM = 500
"""Least priority as a number, Cohere's way, that counts as batch; 0 is realtime."""

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def take_terms(headers: Mapping[str, str], body: dict[str, Json], key: Key) -> CallOptions:
    """Returns the options of a call, and removes their fields from `body`.

    A stream is not ended by the caller's read time-out: that limits the time between two pieces. Raises InvalidRequest
    if a value is not valid, Refusal if the key does not allow the priority.
    """
    priority = _read_priority(_take("priority", body, headers.get(PRIORITY)), key)
    timeout = _read_timeout(_take("timeout", body, headers.get(TIMEOUT)))
    if timeout is None and body.get("stream") is not True:
        # A value that is no number must not fail the request: some libraries send "None" for no limit.
        patience = _number(headers.get(READ_TIMEOUT))
        timeout = patience and max(patience - ANSWER_S, patience / 2)
    version = _take("version", body, headers.get(VERSION, ""))
    sticky = _take("sticky_key", body, body.get("user") or "")
    if not (isinstance(version, str) and isinstance(sticky, str)):
        raise InvalidRequest("version: version, sticky_key and user must be strings")
    return CallOptions(priority, timeout, wait=False, tenant=key.tenant, version=version, sticky_key=sticky)


def read_idempotency_key(headers: Mapping[str, str], key: Key) -> str | None:
    """Returns the key of a call that is made once; None if there is none. Those of two API keys differ.

    Raises InvalidRequest.
    """
    given = headers.get(IDEMPOTENCY_KEY)
    if given is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(given):
        raise InvalidRequest("Idempotency-Key: not 1 to 255 visible ASCII characters")
    return f"{key.name}\0{given}"


def _read_priority(given: Json, key: Key) -> PriorityName:
    if given is None:
        return "normal" if key.allows_priority("normal") else key.highest_priority
    if isinstance(given, str) and given.isdecimal():
        given = int(given[:9])
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        given = "realtime" if given == 0 else "normal" if given < _BATCH_FROM else "batch"
    if given not in _PRIORITIES:
        raise InvalidRequest(f"priority: {str(given)[:80]!r} is not one of {', '.join(_PRIORITIES)}")
    if not key.allows_priority(given):
        message = f"this key allows no priority above {key.highest_priority}"
        raise Refusal(403, "priority_not_allowed", message, param="priority")
    return given


def _take(name: str, body: dict[str, Json], otherwise: Json) -> Json:
    """Removes a field of the body and returns its value; `otherwise` if it is left out or null."""
    value = body.pop(name, None)
    return otherwise if value is None else value


def _read_timeout(given: Json) -> float | None:
    if given is None:
        return None
    seconds = _number(given)
    if seconds is None:
        raise InvalidRequest(f"timeout: {str(given)[:80]!r} is not a number of seconds above 0")
    return seconds


def _number(given: Json) -> float | None:
    """Returns a number of seconds above 0; None if `given` is none."""
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        seconds = float(given)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and 0 < seconds < 1e9 else None
