"""Streamed answers: server-sent events of a text that grows. A stream ends with its whole text or with an error event.

The first piece, or an error in its place, is waited for before the status is sent, so that a full queue is a 429. If
that takes longer than PING_S the answer begins without it, and comments keep the connection alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json
from millstream.client.call_options import CallOptions
from millstream.client.call_request import StreamRequest
from millstream.client.generate import Generated
from millstream.client.openai.requests import OpenAICall
from millstream.client.streaming import AsyncTextStream
from millstream.gateway.api.bodies import to_json
from millstream.gateway.api.calling import find_service
from millstream.gateway.api.errors import Refusal, note, problem_of, write_openai
from millstream.gateway.api.gone import CallerGone, while_connected
from millstream.gateway.api.state import gateway_of

PING_S = 5.0
"""Seconds without an event after which a comment is sent: proxies see that the connection lives."""

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class Format(Protocol):
    """Bodies of the events of one answer."""

    def begin(self) -> Iterable[Mapping[str, Json]]: ...

    def piece(self, text: str) -> Mapping[str, Json]: ...

    def end(self, text: Generated) -> Iterable[Mapping[str, Json]]: ...


class GrowingAnswer:
    """Text of one call, from its first piece to its end. `service` is known once the call has begun."""

    def __init__(self, request: Request, call: OpenAICall, opts: CallOptions) -> None:
        self.service = call.model
        self._request, self._call = request, call
        self._opts = opts._replace(options=call.options, op=call.op)
        self._stream: AsyncTextStream | None = None
        self._next: asyncio.Task[str | None] = asyncio.create_task(self._begin())

    async def ready(self) -> None:
        """Waits for the first piece, for at most PING_S. Raises the call's error, and CallerGone."""
        try:
            await while_connected(self._request.receive, self._wait_for_first())
        except BaseException:
            await self.close()
            raise

    async def _wait_for_first(self) -> None:
        await asyncio.wait({self._next}, timeout=PING_S)
        if self._next.done():
            self._next.result()

    async def pieces(self) -> AsyncIterator[str]:
        """Yields the pieces of the text, and "" after each PING_S without one. Raises the call's error."""
        while True:
            await asyncio.wait({self._next}, timeout=PING_S)
            if not self._next.done():
                yield ""
                continue
            piece = self._next.result()
            if piece is None:
                return
            self._next = asyncio.create_task(self._advance())
            yield piece

    async def close(self) -> None:
        """Cancels the job, unless its text is complete."""
        self._next.cancel()
        if self._stream:
            await self._stream.close()

    def whole(self) -> Generated:
        """Returns the whole text, once `pieces` has ended."""
        found = self._stream.generated if self._stream else None
        if found is None:
            raise MillstreamError("the text ended without a result")
        return found

    async def _begin(self) -> str | None:
        outage = gateway_of(self._request).outage
        return await outage.outlast(self._first_piece, self._opts.timeout)

    async def _first_piece(self, timeout: float | None) -> str | None:
        self.service = await find_service(self._request, self._call, timeout)
        opts = self._opts._replace(timeout=timeout)
        calls = gateway_of(self._request).calls
        self._stream = calls.open(StreamRequest(self.service, self._call.rows[0], opts))
        return await self._advance()

    async def _advance(self) -> str | None:
        return await anext(self._stream, None) if self._stream else None


class EventStream(Response):
    """Answer that sends a text as events. Nobody but this class reads the request's messages meanwhile."""

    def __init__(self, request: Request, answer: GrowingAnswer, write: Format) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._request, self._answer, self._write = request, answer, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._send_all(send))
        except CallerGone:
            return
        except asyncio.CancelledError:
            # The process stops and does not wait any longer: the stream must not look complete.
            with suppress(Exception):
                await self._send(
                    send, self._error(Refusal(503, "gateway_stopping", "the gateway is stopped")), last=True
                )
            raise

    async def _send_all(self, send: Send) -> None:
        try:
            for body in self._write.begin():
                await self._send(send, _event(body))
            async for piece in self._answer.pieces():
                await self._send(send, _event(self._write.piece(piece)) if piece else PING)
            ending = b"".join(map(_event, self._write.end(self._answer.whole()))) + DONE
        except Exception as error:  # noqa: BLE001 - a stream never ends silently, whatever went wrong
            ending = self._error(error)
        finally:
            await self._answer.close()
        await self._send(send, ending, last=True)

    def _error(self, error: Exception) -> bytes:
        problem = problem_of(error)
        note(problem, self._request.url.path, self._request.state.request_id)
        return _event(write_openai(problem))

    async def _send(self, send: Send, body: bytes, last: bool = False) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": not last})


def _event(body: Mapping[str, Json]) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"
