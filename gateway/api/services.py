"""Routes of services of any type, for handlers of a user's own: rows in, results out, as JSON has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json
from millstream.client.generate import Generated
from millstream.client.openai.fields import Fields, StreamFormat, wrong_field
from millstream.client.openai.requests import MAX_INPUTS, OpenAICall
from millstream.client.row_results import RowOutcome
from millstream.gateway.api.bodies import read_body, write_answer
from millstream.gateway.api.calling import Results, run, stamp_of
from millstream.gateway.api.state import gateway_of, key_of
from millstream.gateway.api.streaming import EventStream, GrowingAnswer
from millstream.gateway.api.terms import take_terms

router = APIRouter()


@router.post("/v1/services/{name}")
async def call_service(request: Request, name: str) -> Response:
    """Answers {"input": ...} with {"output": ...}, and {"inputs": [...]} with {"outputs": [...]}."""
    body = await read_body(request, gateway_of(request).settings.max_body)
    opts = take_terms(request.headers, body, key_of(request))
    call = read_call(name, body)
    if call.stream:
        growing = GrowingAnswer(request, call, opts)
        await growing.ready()
        return EventStream(request, growing, TextEvents())
    results = await run(request, call, opts)
    return await write_answer(lambda: _write(call, results), len(results.rows), results.headers)


def read_call(name: str, body: Mapping[str, Json]) -> OpenAICall:
    """Returns the call of a request to the service `name`. Raises InvalidRequest, which names the field."""
    fields = Fields(f"/v1/services/{name[:80]}", {key: value for key, value in body.items() if key != "input"})
    options = fields.take("options", lambda value: isinstance(value, dict), "an object")
    inputs = fields.take("inputs", lambda value: isinstance(value, list), "a list")
    streams = fields.take("stream", lambda value: isinstance(value, bool), "true or false")
    fields.finish()
    # A payload may be null, so the field's presence counts.
    if ("input" in body) == (inputs is not None):
        raise wrong_field("input", "one of input and inputs is needed")
    rows = [body["input"]] if isinstance(inputs, type(None)) else inputs
    if not (isinstance(rows, list) and 0 < len(rows) <= MAX_INPUTS):
        raise wrong_field("inputs", "not a list", f"1 to {MAX_INPUTS} items")
    if streams and inputs is not None:
        raise wrong_field("stream", "a stream has one input")
    stream = StreamFormat(usage=True) if streams else None
    given = options if isinstance(options, dict) else {}
    return OpenAICall("/v1/services", "", rows, given, name, {"single": inputs is None}, stream)


def _write(call: OpenAICall, results: Results) -> dict[str, object]:
    outputs = [_output(row) for row in results.rows]
    return {
        "id": stamp_of(results.service).id,
        "service": results.service,
        **({"output": outputs[0]} if call.details["single"] else {"outputs": outputs}),
        "usage": {"total_tokens": results.tokens},
    }


class TextEvents:
    """Events of a text that grows: {"delta": ...} for each piece, then {"output": ...}."""

    def begin(self) -> Iterator[dict[str, Json]]:
        yield from ()

    def piece(self, text: str) -> dict[str, Json]:
        return {"delta": text}

    def end(self, text: Generated) -> Iterator[dict[str, Json]]:
        yield {"output": text.json()}


def _output(row: RowOutcome) -> object:
    if isinstance(row, MillstreamError):
        raise row
    if isinstance(row, Generated):
        return row.json()
    return np.ascontiguousarray(row) if isinstance(row, np.ndarray) else row
