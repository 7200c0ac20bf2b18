"""Bodies of answers in the shape of OpenAI's API, made of the outcomes of a call's rows. Pure."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np

from millstream.broker.contract.errors import MillstreamError, ModelFailed
from millstream.broker.contract.generation import DEADLINE, LENGTH, Logprob
from millstream.broker.contract.job import Json
from millstream.client.generate import Generated
from millstream.client.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS, RERANKINGS, OpenAICall
from millstream.client.result import read_generation
from millstream.client.row_results import RowOutcome

ARRAY = "array"
"""Format of embeddings beside "float" and "base64", for callers whose writer of JSON knows arrays."""


class Stamp(NamedTuple):
    """Fields of an answer that do not follow from the outcomes. `id` names the answer, without a prefix.

    `model` is the name of what computed it; `created` is in seconds since 1970.
    """

    id: str
    model: str
    created: int


def answer(call: OpenAICall, outcomes: Sequence[RowOutcome], tokens: int, stamp: Stamp) -> dict[str, Json]:
    """Returns the body of the answer. `outcomes` are those of the call's rows, and `tokens` the tokens that they took.

    Texts count their own tokens, so `tokens` is not used for them. Raises the error of the first row that failed, and
    ModelFailed if an outcome has another type than the call asks for.
    """
    for outcome in outcomes:
        if isinstance(outcome, MillstreamError):
            raise outcome
    return _WRITERS[call.url](call, outcomes, tokens, stamp)


def _write_embeddings(call: OpenAICall, outcomes: Sequence[RowOutcome], tokens: int, stamp: Stamp) -> dict[str, Json]:
    encode = _ENCODERS[call.details.get("encoding_format")]
    data: list[Json] = [
        {"object": "embedding", "index": at, "embedding": encode(outcome)} for at, outcome in enumerate(outcomes)
    ]
    usage: Json = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": stamp.model, "usage": usage}


def _to_list(vector: RowOutcome) -> Json:
    # As numpy prints them, numbers have the digits that give the same float32 again; float() alone has twice as many.
    return [float(number) for number in _vector_of(vector).astype(np.str_)]


def _to_base64(vector: RowOutcome) -> Json:
    return base64.b64encode(_vector_of(vector).astype("<f4").tobytes()).decode()


def _vector_of(outcome: RowOutcome) -> np.ndarray:
    if not isinstance(outcome, np.ndarray):
        raise ModelFailed(f"the service answers no dense vectors but {type(outcome).__name__}")
    return outcome


_ENCODERS: Mapping[Json, Callable[[RowOutcome], Json]] = MappingProxyType(
    {"float": _to_list, "base64": _to_base64, ARRAY: lambda vector: cast(Json, _vector_of(vector))}
)


def _write_chat(call: OpenAICall, outcomes: Sequence[RowOutcome], tokens: int, stamp: Stamp) -> dict[str, Json]:
    text = _text_of(outcomes[0])
    message: dict[str, Json] = {"role": "assistant", "content": text.text, "refusal": None}
    if text.tool_calls:
        message["tool_calls"] = tool_calls(text, stamp)
    choice: Json = {"index": 0, "message": message, "logprobs": chat_logprobs(text), "finish_reason": reason_of(text)}
    return _completion("chatcmpl", "chat.completion", [choice], [text], stamp)


def tool_calls(text: Generated, stamp: Stamp) -> list[Json]:
    """Returns the calls of tools in a text, as a message has them."""
    return [_tool_call(each, stamp, at) for at, each in enumerate(text.tool_calls)]


def chat_logprobs(text: Generated) -> Json:
    """Returns the log probabilities of a chat's text; None if the request asked for none."""
    if text.logprobs is None:
        return None
    return {"content": [_chat_logprob(each) for each in text.logprobs], "refusal": None}


def _tool_call(called: Mapping[str, Json], stamp: Stamp, at: int) -> Json:
    arguments = json.dumps(called.get("arguments") or {}, ensure_ascii=False)
    function: Json = {"name": called.get("name"), "arguments": arguments}
    return {"id": f"call_{stamp.id}_{at}", "type": "function", "function": function}


def _chat_logprob(each: Logprob) -> Json:
    top: list[Json] = [_token(token, logprob) for token, logprob in each.top]
    return {**_token(each.token, each.logprob), "top_logprobs": top}


def _token(token: str, logprob: float) -> dict[str, Json]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}


def _write_completions(call: OpenAICall, outcomes: Sequence[RowOutcome], tokens: int, stamp: Stamp) -> dict[str, Json]:
    texts = [_text_of(outcome) for outcome in outcomes]
    choices: list[Json] = [
        {"index": at, "text": text.text, "logprobs": completion_logprobs(text), "finish_reason": reason_of(text)}
        for at, text in enumerate(texts)
    ]
    return _completion("cmpl", "text_completion", choices, texts, stamp)


def completion_logprobs(text: Generated) -> Json:
    """Returns the log probabilities of a completion; None if the request asked for none."""
    if text.logprobs is None:
        return None
    offsets, at = list[Json](), 0
    for each in text.logprobs:
        offsets.append(at)
        at += len(each.token)
    return {
        "tokens": [each.token for each in text.logprobs],
        "token_logprobs": [each.logprob for each in text.logprobs],
        "top_logprobs": [cast(Json, dict(each.top)) for each in text.logprobs],
        "text_offset": offsets,
    }


def _completion(
    prefix: str, kind: str, choices: list[Json], texts: Sequence[Generated], stamp: Stamp
) -> dict[str, Json]:
    return {
        "id": f"{prefix}-{stamp.id}",
        "object": kind,
        "created": stamp.created,
        "model": stamp.model,
        "choices": choices,
        "usage": usage_of(texts),
        "system_fingerprint": texts[0].fingerprint or None,
    }


def usage_of(texts: Sequence[Generated]) -> Json:
    """Returns the tokens of texts."""
    prompt, completion, cached = (
        sum(text.usage.get(name, 0) for text in texts)
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _text_of(outcome: RowOutcome) -> Generated:
    if isinstance(outcome, Generated):
        return outcome
    if not isinstance(outcome, dict):
        raise ModelFailed(f"the service answers no texts but {type(outcome).__name__}")
    # A service of another type that streams: its results are read by those who ask for a text.
    return Generated.of(read_generation(outcome), "", {})


def reason_of(text: Generated) -> str:
    """Returns the finish reason of a text, as OpenAI's API has it."""
    if text.tool_calls:
        return "tool_calls"
    # A text that a time limit ended is incomplete, and OpenAI's API has no other name for it.
    return LENGTH if text.finish_reason == DEADLINE else text.finish_reason


def _write_rerank(call: OpenAICall, outcomes: Sequence[RowOutcome], tokens: int, stamp: Stamp) -> dict[str, Json]:
    scores = [_score_of(outcome) for outcome in outcomes]
    order = sorted(range(len(scores)), key=lambda at: -scores[at])[: cast("int | None", call.details.get("top_n"))]
    results: list[Json] = [{"index": at, "relevance_score": scores[at]} for at in order]
    if call.details.get("return_documents"):
        results = [
            {**cast(dict[str, Json], each), "document": {"text": call.rows[at]}}
            for at, each in zip(order, results, strict=True)
        ]
    return {"object": "list", "model": stamp.model, "results": results, "usage": {"total_tokens": tokens}}


def _score_of(outcome: RowOutcome) -> float:
    if not isinstance(outcome, int | float) or isinstance(outcome, bool):
        raise ModelFailed(f"the service answers no scores but {type(outcome).__name__}")
    return float(outcome)


_WRITERS: Mapping[str, Callable[[OpenAICall, Sequence[RowOutcome], int, Stamp], dict[str, Json]]] = MappingProxyType(
    {
        EMBEDDINGS: _write_embeddings,
        CHAT: _write_chat,
        COMPLETIONS: _write_completions,
        RERANKINGS: _write_rerank,
    }
)
