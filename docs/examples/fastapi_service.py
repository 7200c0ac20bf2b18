"""A microservice that embeds through the queue: `uvicorn --app-dir docs/examples fastapi_service:app`.

MILLSTREAM_REDIS_URL says where the queue is. docs/fastapi.md explains it piece by piece.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    MillstreamError,
    NoWorkers,
    PartialFailure,
    QueueFull,
    RateLimited,
    ServicePaused,
)
from millstream.client import AsyncClient

log = logging.getLogger(__name__)
T = TypeVar("T")

SERVICE = "embed"
TIMEOUT_S = 10.0
CALLERS_FAULT, REFUSED, HUNG_UP, FAILED, UNAVAILABLE, TOO_LATE = 422, 429, 499, 500, 503, 504
STATUS: dict[type[MillstreamError], int] = {
    InvalidRequest: CALLERS_FAULT,  # and InputTooLong, which is one
    QueueFull: REFUSED,
    RateLimited: REFUSED,
    NoWorkers: UNAVAILABLE,
    ServicePaused: UNAVAILABLE,
    BrokerUnavailable: UNAVAILABLE,
    DeadlineExceeded: TOO_LATE,
}


class Texts(BaseModel):
    texts: list[str] = Field(min_length=1, max_length=1024)


class Vectors(BaseModel):
    vectors: list[list[float]]
    tokens: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for the whole process: it sends the calls of all requests together."""
    async with AsyncClient() as app.state.client:
        yield


def client_of(request: Request) -> AsyncClient:
    client: AsyncClient = request.app.state.client
    return client


app = FastAPI(title="Embeddings", lifespan=lifespan)


@app.post("/embed")
async def embed(asked: Texts, request: Request, client: Annotated[AsyncClient, Depends(client_of)]) -> Vectors:
    # wait=False: a full queue is the caller's to know of, not ours to sit out.
    call = client.embed(asked.texts, service=SERVICE, timeout=TIMEOUT_S, wait=False)
    found = await while_connected(request, call)
    return Vectors(vectors=found.tolist(), tokens=found.usage["tokens"])


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether this process serves. It asks nobody: a queue that is away is no reason to restart it."""
    return {"status": "ok"}


async def while_connected(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """The result of `call`. It is cancelled, and so are its jobs, when the caller hangs up or this request ends."""
    answer, gone = asyncio.create_task(call), asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(HUNG_UP)
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    # The body was read before: what comes next is the end of the connection.
    while (await request.receive())["type"] != "http.disconnect":
        pass


@app.exception_handler(MillstreamError)
async def failed(request: Request, error: MillstreamError) -> JSONResponse:
    status = status_of(error)
    if status >= FAILED:
        log.warning("%s: %s", request.url.path, error)
    retry = {"Retry-After": str(max(1, math.ceil(error.retry_after or 0)))} if status in (REFUSED, UNAVAILABLE) else {}
    return JSONResponse(told(error), status, headers=retry)


def status_of(error: MillstreamError) -> int:
    """Where texts failed for several reasons, the highest: what is not the caller's fault alone is worth a retry."""
    if isinstance(error, PartialFailure):
        return max(status_of(each) for each in error.errors.values())
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), FAILED)


def told(error: MillstreamError) -> dict[str, object]:
    """What the caller learns: of their own mistakes all, of ours the kind."""
    if isinstance(error, PartialFailure):
        return {"code": error.code, "errors": {row: told(each) for row, each in error.errors.items()}}
    if status_of(error) == CALLERS_FAULT:
        return {"code": error.code, "message": error.message}
    return {"code": error.code}
