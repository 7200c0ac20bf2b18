"""Requests to servers that already run, and faults of their answers. Pure: no I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, cast

from millstream.broker.contract.job import Json
from millstream.worker.scheduling.active_job import Outcome, Rows


class Call(NamedTuple):
    """One POST request. `path` begins behind the server's URL. `streams`: its answer comes in events."""

    path: str
    body: Mapping[str, Json]
    streams: bool = False


class Kind(Enum):
    """Kinds of faults, by what is to be done."""

    REFUSED = "refused"
    """The server has too much to do: try again later, and send it less."""

    AWAY = "away"
    """No server answered: wait until one does."""

    INVALID = "invalid"
    """The request is at fault: it would fail again."""

    KEY = "key"
    """The server refuses the key."""

    FAILED = "failed"
    """The server failed: try again a few times."""

    BROKEN = "broken"
    """The answer ended early, or cannot be read: try again while the server lives, a few times without new output."""


@dataclass(eq=False)
class Fault(Exception):
    """A request without its answer. `message` is for callers; `retry_s`: the server's Retry-After, seconds."""

    kind: Kind
    message: str
    retry_s: float = 0.0
    too_long: bool = False


_KINDS: Mapping[int, Kind] = {
    401: Kind.KEY,
    403: Kind.KEY,
    408: Kind.REFUSED,
    425: Kind.REFUSED,
    429: Kind.REFUSED,
    502: Kind.AWAY,
    503: Kind.REFUSED,
    504: Kind.AWAY,
    529: Kind.REFUSED,
}

_TOO_LONG = ("context length", "maximum length", "too long", "too many tokens", "exceeds the available context")


def fault_of(status: int, body: bytes, retry_after: str | None = None) -> Fault:
    """Returns the fault that an answer with this HTTP status says."""
    kind = _KINDS.get(status) or (Kind.INVALID if 400 <= status < 500 else Kind.FAILED)
    message = message_of(body)
    too_long = kind is Kind.INVALID and any(each in message.lower() for each in _TOO_LONG)
    return Fault(kind, f"HTTP {status}: {message}" if message else f"HTTP {status}", _seconds(retry_after), too_long)


def _seconds(retry_after: str | None) -> float:
    """The seconds of a Retry-After header; 0.0 if it is missing or a date."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < 86_400 else 0.0


def message_of(body: bytes) -> str:
    """Returns the error message of an answer, at most 300 characters."""
    text = body[:4_096].decode(errors="replace")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:300]
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return " ".join((found if isinstance(found, str) else json.dumps(found)).split())[:300]


def error_of(event: Mapping[str, Json]) -> Fault | None:
    """Returns the fault that an event of a stream says; None if it says none."""
    error = event.get("error")
    if error is None:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600 else 500
    return fault_of(status, json.dumps({"error": error}).encode())


def clean(text: str) -> str:
    """Returns `text` with halves of surrogate pairs, which UTF-8 cannot encode, replaced."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Server(NamedTuple):
    """Facts that a server states of itself. `family`: "vllm", "sglang", "llamacpp", or another owner; "" if unknown."""

    family: str = ""

    @property
    def continues_chats(self) -> bool:
        """Whether it goes on with a last message of the assistant, if it is asked to."""
        return self.family in ("vllm", "sglang")

    @property
    def counts_on(self) -> bool:
        """Whether each event can say how many tokens there are so far."""
        return self.family == "vllm"


class Exchange(Protocol):
    """One request in flight, with the rows that it answers."""

    rows: Rows

    def call(self, server: Server) -> Call:
        """Returns the request."""
        ...

    def finish(self, answer: Json) -> Sequence[Outcome]:
        """Returns an outcome for each row. Raises Fault if `answer` has another shape."""
        ...


def broken(reason: str) -> Fault:
    return Fault(Kind.BROKEN, reason)


def objects(value: Json, where: str) -> Sequence[Mapping[str, Json]]:
    """Returns `value` as a list of objects. Raises Fault."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise broken(f"its answer has no list of objects in {where}")
    return cast("list[dict[str, Json]]", value)
