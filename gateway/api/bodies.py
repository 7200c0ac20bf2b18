"""Bodies of requests and answers: read within a limit, as JSON; large ones off the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import orjson
from starlette.requests import Request
from starlette.responses import Response

from millstream.broker.contract.job import Json
from millstream.gateway.api.errors import Refusal

LARGE = 65_536
"""Bytes from which on a body is read, and its call is made, in a thread: smaller ones take less than a millisecond."""

LARGE_ROWS = 64
"""Rows from which on a call is made, and its answer written, in a thread."""


async def read_body(request: Request, most: int) -> dict[str, Json]:
    """Returns the JSON object of a request's body, and sets `request.state.size`, its bytes.

    Raises Refusal if it has more than `most` bytes or is none, and Starlette's ClientDisconnect.
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


def is_large(request: Request, rows: int) -> bool:
    """Returns whether a request whose body was read, and that asks for `rows` results, is worth a thread."""
    return rows > LARGE_ROWS or int(request.state.size) > LARGE


async def write_answer(make: Callable[[], object], rows: int = 1, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an answer with the body that `make` makes of `rows` results, as JSON. Raises as `make` does."""

    def write() -> bytes:
        return to_json(make())

    content = await asyncio.to_thread(write) if rows > LARGE_ROWS else write()
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
