"""Bodies of requests and answers: read within a limit, as JSON; large ones off the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, cast

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from millstream.broker.contract.job import Json
from millstream.gateway.api.errors import Refusal

LARGE = 65_536
"""Bytes from which on a body is read, and its call is made, in a thread: smaller ones take less than a millisecond."""

LARGE_ROWS = 64
"""Rows from which on an answer is written in a thread."""


async def read_body(request: Request, most: int) -> dict[str, Json]:
    """Returns the JSON object of a request's body.

    Raises Refusal if it has more than `most` bytes or is none, and ClientDisconnect. Sets `request.state.size`, bytes.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "unsupported_encoding", "the body is compressed: send it as it is")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
    request.state.size = len(body)
    value = await asyncio.to_thread(_parse, body) if len(body) > LARGE else _parse(body)
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_request", "the body is no JSON object", param="body")
    return cast(dict[str, Json], value)


def is_large(request: Request) -> bool:
    """Returns whether the body of a request was large."""
    return int(getattr(request.state, "size", 0)) > LARGE


async def write_answer(body: Any, rows: int = 1, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an answer with `body`, made of `rows` results, as JSON. Arrays of NumPy become lists."""
    content = await asyncio.to_thread(to_json, body) if rows > LARGE_ROWS else to_json(body)
    return Response(content, media_type="application/json", headers=headers)


def to_json(value: Any) -> bytes:
    """Returns `value` as JSON. Arrays of NumPy become lists."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        # Whole numbers of more than 64 bits, which a handler of a user's own may answer.
        return json.dumps(value, default=_to_list).encode()


def _to_list(value: Any) -> Any:
    return value.tolist()


def _parse(body: bytearray) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "invalid_request", f"the body is no JSON: {error}", param="body") from None


def _too_large(most: int) -> Refusal:
    return Refusal(413, "request_too_large", f"the body has more than {most} bytes: send it in several requests")


__all__ = ["ClientDisconnect", "is_large", "read_body", "to_json", "write_answer"]
