"""Makes the call of a request, and answers with its results. The call ends when the caller leaves."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from starlette.requests import Request

from millstream.broker.config.fields import SERVICE_NAME
from millstream.broker.contract.errors import (
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    PartialFailure,
    UnknownService,
)
from millstream.broker.contract.job import Json
from millstream.client.async_handle import AsyncHandle
from millstream.client.call_options import CallOptions
from millstream.client.openai.answers import Stamp
from millstream.client.openai.requests import OpenAICall
from millstream.client.result import Embeddings, Values
from millstream.client.row_results import RowOutcome
from millstream.gateway.api.bodies import is_large
from millstream.gateway.api.gone import while_connected
from millstream.gateway.api.state import gateway_of, key_of
from millstream.gateway.api.terms import read_idempotency_key


class Results(NamedTuple):
    """Results of a call's rows by `service`. `timings` are in ms; `version` is that of a route, "" without one."""

    service: str
    rows: Sequence[RowOutcome]
    tokens: int
    timings: Mapping[str, float]
    version: str

    def vectors(self) -> np.ndarray:
        """Returns the results as one array, float32 [rows, dim]. Raises ModelFailed if they are no dense vectors."""
        if not all(isinstance(row, np.ndarray) for row in self.rows):
            raise ModelFailed("the service answers no dense vectors")
        return np.stack(self.rows, dtype=np.float32)  # type: ignore[arg-type]

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say how long the call waited and ran, and which version answered."""
        named = (("queue", "x-queue-ms"), ("inference", "x-inference-ms"))
        found = {header: f"{self.timings[name]:.1f}" for name, header in named if name in self.timings}
        return found | ({"x-version": self.version} if self.version else {})


async def run(request: Request, call: OpenAICall, opts: CallOptions) -> Results:
    """Returns the results of `call`, whose `model` names the service or route; "" is the only one that can run it.

    Raises the error of the first row that failed, CallerGone, Refusal if the server is away and too many calls wait.
    """
    key = read_idempotency_key(request.headers, key_of(request))
    return await while_connected(request.receive, _run(request, call, opts, key))


async def _run(request: Request, call: OpenAICall, opts: CallOptions, key: str | None) -> Results:
    gateway = gateway_of(request)
    opts = opts._replace(options=call.options, op=call.op)
    service = call.model

    async def attempt(timeout: float | None) -> Embeddings | list[Json]:
        nonlocal service
        service = await find_service(request, call, timeout)
        own = opts._replace(timeout=timeout)
        if key is not None:
            detached = await gateway.calls.submit_detached(service, call.rows, own, key)
            return await gateway.calls.wait_detached(detached, timeout)
        handle = await gateway.calls.start(service, call.rows, own, in_thread=is_large(request, len(call.rows)))
        return await AsyncHandle(handle).result()

    try:
        # Results have their usage and timings, whatever they are.
        result = cast("Embeddings | Values", await gateway.outage.outlast(attempt, opts.timeout))
    except PartialFailure as error:
        raise _first_of(error) from None
    rows = list(np.asarray(result)) if isinstance(result, Embeddings) else list(result)
    return Results(service, rows, result.usage.get("tokens", 0), result.timings, result.version)


async def find_service(request: Request, call: OpenAICall, timeout: float | None) -> str:
    """Returns the service that a call goes to. Raises UnknownService, also if the key does not allow it."""
    calls = gateway_of(request).calls
    until = None if timeout is None else time.monotonic() + timeout
    service = call.model
    if not service:
        try:
            service = await calls.only(call.op, until)
        except UnknownService:
            raise InvalidRequest(f"model: name it: there is not exactly one service that can {call.op}") from None
    if not re.fullmatch(SERVICE_NAME, service) or not key_of(request).allows(service):
        raise UnknownService(f"no service {service[:80]!r}")
    return service


def stamp_of(service: str) -> Stamp:
    """Returns the fields of a new answer that do not follow from its results."""
    return Stamp(uuid.uuid4().hex, service, int(time.time()))


def _first_of(failure: PartialFailure) -> MillstreamError:
    """Returns the error of the first row that failed, which names the row."""
    row, error = min(failure.errors.items())
    error.message = f"{error.message} (row {row})"
    return error
