"""Routes of Text Embeddings Inference, which has no names of models: embed, rerank, info.

Below /tei/NAME they are those of one service; without it, of the only service that can answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from millstream.broker.contract.errors import InvalidRequest, UnknownService
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import EMBED, RERANK
from millstream.client.openai.answers import answer
from millstream.client.openai.fields import Fields, wrong_field
from millstream.client.openai.requests import MAX_INPUTS, RERANKINGS, OpenAICall, read_request
from millstream.gateway.api.bodies import read_body, write_answer
from millstream.gateway.api.calling import find_service, run, stamp_of
from millstream.gateway.api.errors import Refusal
from millstream.gateway.api.state import gateway_of, key_of
from millstream.gateway.api.terms import take_terms

router = APIRouter()

_SIDES: Mapping[str, str] = {"Right": "end", "Left": "start", "right": "end", "left": "start"}
_PROMPTS: Mapping[str, str] = {"query": "query", "document": "document", "passage": "document"}


@router.post("/embed")
@router.post("/tei/{service}/embed")
async def embed(request: Request, service: str = "") -> Response:
    body = await read_body(request, gateway_of(request).settings.max_body)
    opts = take_terms(request.headers, body, key_of(request))
    results = await run(request, read_embed(body, service), opts)
    return await write_answer(results.vectors, len(results.rows), results.headers)


@router.post("/rerank")
@router.post("/tei/{service}/rerank")
async def rerank(request: Request, service: str = "") -> Response:
    """Answers as TEI does, or as Jina if the request has `documents`: both have this path."""
    body = await read_body(request, gateway_of(request).settings.max_body)
    opts = take_terms(request.headers, body, key_of(request))
    is_jinas = "documents" in body
    if is_jinas and service:
        body["model"] = service
    call = read_request(RERANKINGS, body) if is_jinas else read_rerank(body, service)
    results = await run(request, call, opts)
    written: Any = answer(call, results.rows, results.tokens, stamp_of(results.service))
    if not is_jinas:
        written = [_ranked(each) for each in written["results"]]
    return await write_answer(lambda: written, headers=results.headers)


@router.get("/info")
@router.get("/tei/{service}/info")
async def info(request: Request, service: str = "") -> Response:
    name = await find_service(request, OpenAICall("/info", EMBED.op, [], {}, service), None)
    if name not in await gateway_of(request).models.get():
        raise UnknownService(f"no service {name[:80]!r}")
    return await write_answer(lambda: {"model_id": name, "max_client_batch_size": MAX_INPUTS, "auto_truncate": False})


@router.get("/tei/{service}/health")
async def health(service: str) -> Response:
    return PlainTextResponse("ok\n")


def read_embed(body: Mapping[str, Json], service: str) -> OpenAICall:
    """Returns the call of a request to embed. Raises InvalidRequest, which names the field."""
    fields = Fields("/embed", body)
    given = fields.require("inputs")
    rows = [given] if isinstance(given, str) else _check_rows("inputs", given)
    normalize = fields.take("normalize", _is_bool, "true or false")
    options: dict[str, Json] = {"normalize": normalize is not False, "truncate": _read_truncate(fields)}
    prompt = fields.take("prompt_name", lambda value: value in _PROMPTS, ", ".join(_PROMPTS))
    if prompt is not None:
        options["input_type"] = _PROMPTS[str(prompt)]
    options |= fields.take_all(("dimensions",))
    fields.finish()
    return OpenAICall("/embed", EMBED.op, rows, options, service)


def read_rerank(body: Mapping[str, Json], service: str) -> OpenAICall:
    """Returns the call of a request to rerank. Raises InvalidRequest, which names the field."""
    fields = Fields("/rerank", body)
    rows = _check_rows("texts", fields.require("texts"))
    options: dict[str, Json] = {"query": fields.require("query"), "truncate": _read_truncate(fields)}
    options["scores"] = "raw" if fields.take("raw_scores", _is_bool, "true or false") else "sigmoid"
    returned = fields.take("return_text", _is_bool, "true or false")
    fields.finish()
    return OpenAICall(RERANKINGS, RERANK.op, rows, options, service, {"return_documents": bool(returned)})


def _ranked(result: dict[str, Any]) -> dict[str, Json]:
    ranked: dict[str, Json] = {"index": result["index"], "score": result["relevance_score"]}
    return {**ranked, "text": result["document"]["text"]} if "document" in result else ranked


def _read_truncate(fields: Fields) -> str:
    truncate = fields.take("truncate", _is_bool, "true or false")
    side = fields.take("truncation_direction", lambda value: value in _SIDES, "Left or Right")
    return _SIDES[str(side or "Right")] if truncate else "none"


def _check_rows(name: str, value: Json) -> Sequence[Json]:
    if not (isinstance(value, list) and value):
        raise wrong_field(name, "not a string or a list of them")
    if len(value) > MAX_INPUTS:
        raise Refusal(413, "request_too_large", f"{name}: {len(value)} of them, at most {MAX_INPUTS} in one request")
    if not all(isinstance(each, str) for each in value):
        raise InvalidRequest(f"{name}: token ids and pairs are not supported, only texts")
    return value


def _is_bool(value: Json) -> bool:
    return isinstance(value, bool)
