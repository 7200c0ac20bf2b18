"""Bodies of requests in the shape of OpenAI's API, as calls: rows and options of an operation. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import cast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import EMBED, GENERATE, RERANK
from millstream.client.openai.fields import (
    TOKEN_IDS,
    Fields,
    StreamFormat,
    read_chat_options,
    read_options,
    read_stream,
    wrong_field,
)

Body = Mapping[str, Json]
"""Body of a request or of an answer, as JSON has it."""

EMBEDDINGS, CHAT, COMPLETIONS, RERANKINGS = "/v1/embeddings", "/v1/chat/completions", "/v1/completions", "/v1/rerank"

STREAMING = frozenset({CHAT, COMPLETIONS})
"""URLs of requests for texts, which can be streamed."""

MAX_INPUTS = 2_048
"""Inputs of one request at most, as in OpenAI's API."""

COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that gives none, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class OpenAICall:
    """Call that a request asks for. All `rows` have the same `options`; `op` is the operation that must run.

    `url` and `details` are for `answers.answer`: `details` holds what decides the shape of the answer. `model` is what
    the request names; "" if it names none. `stream` is None if the answer is one body.
    """

    url: str
    op: str
    rows: Sequence[Json]
    options: Mapping[str, Json]
    model: str = ""
    details: Mapping[str, Json] = field(default_factory=lambda: MappingProxyType({}))
    stream: StreamFormat | None = None


def read_request(url: str, body: Json, *, may_stream: bool = False) -> OpenAICall:
    """Returns the call of a request. Raises InvalidRequest, which names the field that is wrong or not supported.

    `may_stream`: a request for one text may ask for it in pieces.
    """
    if url not in _READERS:
        raise InvalidRequest(f"url: {str(url)[:80]!r} is not supported", hint=f"one of {', '.join(_READERS)}")
    if not isinstance(body, dict):
        raise InvalidRequest("body: not a JSON object")
    fields = Fields(url, body)
    # `user` and the others say who asks, not what: no result depends on them.
    fields.ignore("user", "safety_identifier", "metadata", "service_tier", "prompt_cache_key")
    model = fields.take("model", _is_text, "a string") or ""
    stream = read_stream(fields) if may_stream and url in STREAMING else None
    call = _READERS[url](fields, cast(str, model))
    fields.finish()
    if stream and len(call.rows) != 1:
        raise wrong_field("stream", "a stream has one prompt", "send a request for each")
    return replace(call, stream=stream)


def _read_embeddings(fields: Fields, model: str) -> OpenAICall:
    rows = _read_texts(fields.require("input"))
    encoding = fields.take("encoding_format", lambda value: value in ("float", "base64"), "float or base64") or "float"
    options = read_options(fields, ("dimensions", "truncate", "input_type", "prompt", "normalize"))
    return OpenAICall(EMBEDDINGS, EMBED.op, rows, options, model, {"encoding_format": encoding})


def _read_texts(value: Json) -> Sequence[Json]:
    if isinstance(value, str):
        return [value]
    if not (isinstance(value, list) and 0 < len(value) <= MAX_INPUTS):
        raise wrong_field("input", "not a string or a list of strings", f"1 to {MAX_INPUTS} of them")
    for at, each in enumerate(value):
        if isinstance(each, int | list):
            raise wrong_field(
                "input",
                f"{TOKEN_IDS}: they depend on the model's tokenizer",
                "send texts; LangChain does with check_embedding_ctx_length=False",
            )
        if not isinstance(each, str):
            raise wrong_field(f"input[{at}]", "not a string")
    return value


def _read_chat(fields: Fields, model: str) -> OpenAICall:
    row: dict[str, Json] = {"messages": fields.require("messages")}
    tools = fields.take("tools", lambda value: isinstance(value, list), "a list")
    choice = fields.take(
        "tool_choice", lambda value: value in ("auto", "none"), "auto or none: others are not supported"
    )
    if tools and choice != "none":
        row["tools"] = tools
    return OpenAICall(CHAT, GENERATE.op, [row], read_chat_options(fields), model)


def _read_completions(fields: Fields, model: str) -> OpenAICall:
    rows = _read_prompts(fields.require("prompt"))
    for name, harmless in (("echo", False), ("suffix", ""), ("best_of", 1)):
        fields.refuse(name, harmless)
    options = read_options(fields)
    options.setdefault("max_tokens", COMPLETION_TOKENS)
    return OpenAICall(COMPLETIONS, GENERATE.op, rows, options, model)


def _read_prompts(value: Json) -> Sequence[Json]:
    if isinstance(value, str):
        return [value]
    if not (isinstance(value, list) and 0 < len(value) <= MAX_INPUTS):
        raise wrong_field("prompt", "not a string, a list of strings or of token ids")
    if all(isinstance(each, int) for each in value):
        return [{"token_ids": value}]
    return [{"token_ids": each} if isinstance(each, list) else each for each in value]


def _read_rerank(fields: Fields, model: str) -> OpenAICall:
    documents = fields.require("documents")
    if not (isinstance(documents, list) and 0 < len(documents) <= MAX_INPUTS):
        raise wrong_field("documents", "not a list of strings", f"1 to {MAX_INPUTS} of them")
    rows = [each.get("text") if isinstance(each, dict) else each for each in documents]
    top_n = fields.take("top_n", _is_count, "a whole number above 0")
    returned = fields.take("return_documents", lambda value: isinstance(value, bool), "true or false")
    options = read_options(fields, ("instruction", "truncate", "scores"))
    options["query"] = fields.require("query")
    details: Body = {"top_n": top_n, "return_documents": bool(returned)}
    return OpenAICall(RERANKINGS, RERANK.op, rows, options, model, details)


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_READERS: Mapping[str, Callable[[Fields, str], OpenAICall]] = MappingProxyType(
    {
        EMBEDDINGS: _read_embeddings,
        CHAT: _read_chat,
        COMPLETIONS: _read_completions,
        RERANKINGS: _read_rerank,
    }
)
