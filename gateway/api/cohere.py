"""Routes of Cohere's API, version 2: embed and rerank."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import EMBED, RERANK
from millstream.client.openai.answers import answer
from millstream.client.openai.fields import Fields, wrong_field
from millstream.client.openai.requests import MAX_INPUTS, RERANKINGS, OpenAICall
from millstream.gateway.api.bodies import read_body, write_answer
from millstream.gateway.api.calling import Results, run, stamp_of
from millstream.gateway.api.state import gateway_of, key_of
from millstream.gateway.api.terms import take_terms

router = APIRouter()

EMBED_PATH, RERANK_PATH = "/v2/embed", "/v2/rerank"

_INPUT_TYPES: Mapping[str, str] = {
    "search_document": "document",
    "search_query": "query",
    "classification": "none",
    "clustering": "none",
}
_TRUNCATES: Mapping[str, str] = {"NONE": "none", "START": "start", "END": "end"}


@router.post(EMBED_PATH)
async def embed(request: Request) -> Response:
    body = await read_body(request, gateway_of(request).settings.max_body)
    opts = take_terms(request.headers, body, key_of(request))
    call = read_embed(body)
    results = await run(request, call, opts)
    return await write_answer(lambda: _write_embed(call, results), len(results.rows), results.headers)


@router.post(RERANK_PATH)
async def rerank(request: Request) -> Response:
    body = await read_body(request, gateway_of(request).settings.max_body)
    opts = take_terms(request.headers, body, key_of(request))
    call = read_rerank(body)
    results = await run(request, call, opts)
    stamp = stamp_of(results.service)
    ranked = answer(call, results.rows, results.tokens, stamp)["results"]
    written = {"id": stamp.id, "results": ranked, "meta": _meta(results)}
    return await write_answer(lambda: written, headers=results.headers)


def read_embed(body: Mapping[str, Json]) -> OpenAICall:
    """Returns the call of a request to embed. Raises InvalidRequest, which names the field."""
    fields = Fields(EMBED_PATH, body)
    model = _read_model(fields)
    kind = fields.take("input_type", lambda value: value in _INPUT_TYPES, ", ".join(_INPUT_TYPES))
    types = fields.take("embedding_types", _are_types, ", ".join(ENCODERS)) or ["float"]
    given, inputs = fields.take_all(("texts",)).get("texts"), fields.take_all(("inputs",)).get("inputs")
    if (given is None) == (inputs is None):
        raise wrong_field("texts", "one of texts and inputs is needed")
    rows = _check_rows("texts", given) if inputs is None else list(map(_text_of, _check_rows("inputs", inputs)))
    options: dict[str, Json] = {"truncate": _read_truncate(fields)}
    if kind is not None:
        options["input_type"] = _INPUT_TYPES[str(kind)]
    if (dimension := fields.take("output_dimension", _is_count, "a whole number above 0")) is not None:
        options["dimensions"] = dimension
    fields.finish()
    return OpenAICall(EMBED_PATH, EMBED.op, rows, options, model, {"types": types})


def read_rerank(body: Mapping[str, Json]) -> OpenAICall:
    """Returns the call of a request to rerank. Raises InvalidRequest, which names the field."""
    fields = Fields(RERANK_PATH, body)
    model = _read_model(fields)
    rows = _check_rows("documents", fields.require("documents"))
    top_n = fields.take("top_n", _is_count, "a whole number above 0")
    options: dict[str, Json] = {"query": fields.require("query"), "truncate": "end"}
    fields.finish()
    # Answered as Jina's API does, whose results have the same shape.
    return OpenAICall(RERANKINGS, RERANK.op, rows, options, model, {"top_n": top_n})


def _write_embed(call: OpenAICall, results: Results) -> dict[str, object]:
    vectors = results.vectors()
    return {
        "id": stamp_of(results.service).id,
        "response_type": "embeddings_by_type",
        "embeddings": {name: ENCODERS[name](vectors) for name in cast(list[str], call.details["types"])},
        "texts": call.rows,
        "meta": _meta(results),
    }


def _read_model(fields: Fields) -> str:
    return cast(str, fields.take("model", lambda value: isinstance(value, str), "a string") or "")


def _read_truncate(fields: Fields) -> str:
    given = fields.take("truncate", lambda value: value in _TRUNCATES, ", ".join(_TRUNCATES))
    return _TRUNCATES[str(given or "END")]


def _check_rows(name: str, value: Json) -> Sequence[Json]:
    if not (isinstance(value, list) and 0 < len(value) <= MAX_INPUTS):
        raise wrong_field(name, "not a list", f"1 to {MAX_INPUTS} items")
    return value


def _text_of(value: Json) -> Json:
    """Returns the text of one of `inputs`, {"content": [{"type": "text", "text": ...}]}."""
    parts = value.get("content") if isinstance(value, dict) else None
    texts = [each.get("text") for each in parts if isinstance(each, dict)] if isinstance(parts, list) else []
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise InvalidRequest("inputs: each needs a content of one text; images are not supported")
    return texts[0]


def _are_types(value: Json) -> bool:
    return isinstance(value, list) and bool(value) and all(each in ENCODERS for each in value)


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _meta(results: Results) -> Json:
    tokens: dict[str, Json] = {"input_tokens": results.tokens}
    return {"api_version": {"version": "2"}, "billed_units": tokens, "tokens": tokens}


def _to_base64(vectors: np.ndarray) -> object:
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]


def _to_bits(vectors: np.ndarray) -> np.ndarray:
    """Returns one bit for each number, 1 if it is above 0, eight in a byte."""
    return np.packbits(vectors > 0, axis=1)


ENCODERS: Mapping[str, Callable[[np.ndarray], object]] = {
    "float": lambda vectors: vectors,
    "base64": _to_base64,
    "ubinary": lambda vectors: _to_bits(vectors).tolist(),
    "binary": lambda vectors: (_to_bits(vectors).astype(np.int16) - 128).tolist(),
}
"""Types of embeddings. int8 and uint8 need ranges of numbers that belong to the model, which nobody gives."""
