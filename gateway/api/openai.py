"""Routes of OpenAI's API, and Jina's rerank. client/openai has the shapes of their bodies."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from millstream.client.openai.answers import ARRAY, answer
from millstream.client.openai.chunks import Chunks
from millstream.client.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS, RERANKINGS, OpenAICall, read_request
from millstream.gateway.api.bodies import read_body, write_answer
from millstream.gateway.api.calling import run, stamp_of
from millstream.gateway.api.errors import Refusal
from millstream.gateway.api.state import gateway_of, key_of
from millstream.gateway.api.streaming import EventStream, GrowingAnswer
from millstream.gateway.api.terms import IDEMPOTENCY_KEY, take_terms

router = APIRouter()


@router.post(EMBEDDINGS)
async def embeddings(request: Request) -> Response:
    return await _answer(request, EMBEDDINGS)


@router.post(CHAT)
async def chat_completions(request: Request) -> Response:
    return await _answer(request, CHAT)


@router.post(COMPLETIONS)
async def completions(request: Request) -> Response:
    return await _answer(request, COMPLETIONS)


@router.post(RERANKINGS)
async def rerank(request: Request) -> Response:
    return await _answer(request, RERANKINGS)


@router.post("/v1/responses")
async def responses(request: Request) -> Response:
    message = f"/v1/responses is not supported: use {CHAT}, which client libraries call `chat.completions`"
    raise Refusal(404, "unknown_path", message)


async def _answer(request: Request, url: str) -> Response:
    """Answers a request in OpenAI's shape, with one body or with a stream."""
    body = await read_body(request, gateway_of(request).settings.max_body)
    opts = take_terms(request.headers, body, key_of(request))
    call = read_request(url, body, may_stream=True)
    if call.stream:
        if IDEMPOTENCY_KEY in request.headers:
            raise Refusal(400, "invalid_request", "Idempotency-Key: a streamed answer cannot be given again")
        growing = GrowingAnswer(request, call, opts)
        await growing.ready()
        return EventStream(request, growing, Chunks(call, stamp_of(growing.service)))
    results = await run(request, call, opts)
    stamp, shaped = stamp_of(results.service), _with_arrays(call)
    return await write_answer(
        lambda: answer(shaped, results.rows, results.tokens, stamp), len(results.rows), results.headers
    )


def _with_arrays(call: OpenAICall) -> OpenAICall:
    """Returns the call with vectors as arrays in place of lists: their JSON is written twenty times as fast."""
    if call.details.get("encoding_format") != "float":
        return call
    return replace(call, details={**call.details, "encoding_format": ARRAY})
