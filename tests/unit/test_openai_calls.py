"""Requests of OpenAI's API as calls, and their outcomes as its answers."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from millstream.broker.contract.errors import (
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    NoWorkers,
    QueueFull,
    UnknownService,
)
from millstream.broker.contract.generation import GenerateOptions, Logprob
from millstream.client.generate import Generated
from millstream.client.openai.answers import Stamp, answer
from millstream.client.openai.batch import read_line, write_line
from millstream.client.openai.chunks import Chunks
from millstream.client.openai.failures import body_of, status_of
from millstream.client.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS, RERANKINGS, read_request

STAMP = Stamp("abc", "mine", 1_700_000_000)
HELLO: Any = [{"role": "user", "content": "hello"}]
TEXT = Generated("a mill", "stop", {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 1}, version="v")
VECTOR = np.array([0.1, -2.5e-30, 3.0], np.float32)


def test_embeddings_take_a_text_or_a_list_of_texts() -> None:
    one = read_request(EMBEDDINGS, {"model": "m", "input": "a", "dimensions": 64, "user": "me"})
    several = read_request(EMBEDDINGS, {"model": "m", "input": ["a", "b"], "encoding_format": "base64"})

    assert (one.op, one.rows, one.options, one.model) == ("embed", ["a"], {"dimensions": 64}, "m")
    assert (several.rows, several.options) == (["a", "b"], {})


def test_answers_of_embeddings_have_the_same_float32_as_numbers_or_base64() -> None:
    for encoding in ("float", "base64"):
        call = read_request(EMBEDDINGS, {"input": ["a", "b"], "encoding_format": encoding})

        body: Any = json.loads(json.dumps(answer(call, [VECTOR, VECTOR * 2], 7, STAMP)))

        assert (body["object"], body["model"]) == ("list", "mine")
        assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert [each["index"] for each in body["data"]] == [0, 1]
        second = body["data"][1]["embedding"]
        found = np.frombuffer(base64.b64decode(second), "<f4") if encoding == "base64" else np.asarray(second, "f4")
        assert (found == VECTOR * 2).all()


def test_options_of_a_chat_get_our_names() -> None:
    schema: Any = {"type": "object"}
    call = read_request(
        CHAT,
        {
            "messages": HELLO,
            "max_completion_tokens": 9,
            "temperature": 0.5,
            "stop": ["x"],
            "seed": 3,
            "n": 1,
            "stream": False,
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}},
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "auto",
            "presence_penalty": None,
        },
    )

    assert call.rows == [{"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}]
    options = GenerateOptions.read(call.options)
    assert options.json() == {
        "max_tokens": 9,
        "temperature": 0.5,
        "stop": ["x"],
        "seed": 3,
        "logprobs": 2,
        "response_format": {"type": "json_schema", "schema": schema},
    }


def test_an_answer_of_a_chat_has_its_message_usage_and_log_probabilities() -> None:
    call = read_request(CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 1})
    text = Generated(**{**fields_of(TEXT), "logprobs": (Logprob("a", -0.5, (("b", -1.0),)),)})

    body: Any = answer(call, [text], 0, STAMP)

    assert (body["id"], body["object"], body["created"]) == ("chatcmpl-abc", "chat.completion", 1_700_000_000)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a mill", "refusal": None}
    assert choice["finish_reason"] == "stop"
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == ("a", -0.5, [97])
    assert token["top_logprobs"][0]["token"] == "b"
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert body["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 1}}


def test_calls_of_tools_have_ids_and_arguments_as_json() -> None:
    text = Generated(**{**fields_of(TEXT), "tool_calls": ({"name": "f", "arguments": {"x": 1}},)})

    body: Any = answer(read_request(CHAT, {"messages": HELLO}), [text], 0, STAMP)

    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert (call["type"], call["id"]) == ("function", "call_abc_0")


def test_completions_have_a_choice_for_each_prompt_and_16_tokens_by_default() -> None:
    call = read_request(COMPLETIONS, {"prompt": ["a", "b"], "logprobs": 0})

    late = Generated(**{**fields_of(TEXT), "finish_reason": "deadline"})
    body: Any = answer(call, [TEXT, late], 0, STAMP)

    assert call.options == {"max_tokens": 16, "logprobs": 0}
    assert (body["id"], body["object"]) == ("cmpl-abc", "text_completion")
    assert [(each["index"], each["finish_reason"]) for each in body["choices"]] == [(0, "stop"), (1, "length")]
    assert body["usage"]["total_tokens"] == 14


def test_prompts_may_be_token_ids() -> None:
    assert read_request(COMPLETIONS, {"prompt": [1, 2]}).rows == [{"token_ids": [1, 2]}]
    assert read_request(COMPLETIONS, {"prompt": [[1], [2, 3]]}).rows == [{"token_ids": [1]}, {"token_ids": [2, 3]}]


def test_rankings_are_sorted_and_cut() -> None:
    call = read_request(
        RERANKINGS, {"query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2, "return_documents": True}
    )

    body: Any = answer(call, [0.1, 0.9, 0.5], 12, STAMP)

    assert (call.rows, call.options) == (["a", "b", "c"], {"query": "q"})
    assert [(each["index"], each["relevance_score"]) for each in body["results"]] == [(1, 0.9), (2, 0.5)]
    assert body["results"][0]["document"] == {"text": "b"}
    assert body["usage"] == {"total_tokens": 12}


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (EMBEDDINGS, {}, "input"),
        (EMBEDDINGS, {"input": []}, "input"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (EMBEDDINGS, {"input": "a", "temperature": 1}, "temperature"),
        (CHAT, {"messages": HELLO, "n": 2}, "n"),
        (CHAT, {"messages": HELLO, "stream": True}, "stream"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": HELLO, "audio": {}}, "audio"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "echo"),
        (COMPLETIONS, {"prompt": "a", "best_of": 1.0}, "best_of"),
        (RERANKINGS, {"documents": ["a"]}, "query"),
        (RERANKINGS, {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
    ],
)
def test_a_field_that_is_missing_wrong_or_not_supported_is_named(url: str, body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        read_request(url, body)

    error: Any = body_of(caught.value)["error"]
    assert (error["param"], error["type"], error["code"]) == (param, "invalid_request_error", "invalid_request")


def test_token_ids_of_a_foreign_tokenizer_have_a_code_and_a_way_out() -> None:
    several: Any = ([1, 2], [[1, 2], [3]])
    for given in several:
        with pytest.raises(InvalidRequest, match="check_embedding_ctx_length=False") as caught:
            read_request(EMBEDDINGS, {"input": given})

        error: Any = body_of(caught.value)["error"]
        assert (error["code"], error["param"]) == ("token_ids_not_supported", "input")


def test_codes_that_programs_look_for_are_openais() -> None:
    unknown: Any = body_of(UnknownService("no service 'm'"))["error"]
    long: Any = body_of(InputTooLong("5 tokens, the model reads 4"))["error"]

    assert (unknown["code"], unknown["param"]) == ("model_not_found", "model")
    assert long["code"] == "context_length_exceeded"


def test_a_stream_of_a_chat_has_role_pieces_reason_calls_and_usage() -> None:
    body: Any = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    chunks = Chunks(read_request(CHAT, body, may_stream=True), STAMP)
    text = Generated(**{**fields_of(TEXT), "tool_calls": ({"name": "f", "arguments": {"x": 1}},)})

    sent: list[Any] = [*chunks.begin(), chunks.piece("a mill"), *chunks.end(text)]

    assert {each["object"] for each in sent} == {"chat.completion.chunk"}
    deltas = [each["choices"][0]["delta"] for each in sent[:3]]
    assert deltas[:2] == [{"role": "assistant", "content": ""}, {"content": "a mill"}]
    (called,) = deltas[2]["tool_calls"]
    assert (called["index"], called["function"]["name"], sent[2]["choices"][0]["finish_reason"]) == (
        0,
        "f",
        "tool_calls",
    )
    assert (sent[3]["choices"], sent[3]["usage"]["total_tokens"]) == ([], 7)
    assert all(each["usage"] is None for each in sent[:3])


def test_a_stream_of_a_completion_has_no_usage_unless_it_asks() -> None:
    chunks = Chunks(read_request(COMPLETIONS, {"prompt": "a", "stream": True}, may_stream=True), STAMP)

    sent: list[Any] = [*chunks.begin(), chunks.piece("a"), *chunks.end(TEXT)]

    assert [each["choices"][0]["text"] for each in sent] == ["a", ""]
    assert [each["choices"][0]["finish_reason"] for each in sent] == [None, "stop"]
    assert not any("usage" in each for each in sent)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["a", "b"], "stream": True}, "stream"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usag": True}}, "include_usag"),
    ],
)
def test_a_stream_that_cannot_be_given_is_refused(body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{param}"):
        read_request(COMPLETIONS, body, may_stream=True)


def test_a_misspelt_field_gets_a_suggestion() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
        read_request(CHAT, {"messages": HELLO, "temprature": 1})


def test_an_option_that_the_model_refuses_is_named_too() -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateOptions.read(read_request(CHAT, {"messages": HELLO, "top_p": 7}).options)

    error: Any = body_of(caught.value)["error"]
    assert error["param"] == "top_p"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputTooLong("long"), 400),
        (QueueFull("full"), 429),
        (NoWorkers("none"), 503),
        (DeadlineExceeded("late"), 504),
        (ModelFailed("no"), 500),
    ],
)
def test_errors_have_the_status_that_clients_of_openai_expect(error: MillstreamError, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (EMBEDDINGS, {"input": "a"}),
        (CHAT, {"messages": HELLO}),
        (RERANKINGS, {"query": "q", "documents": ["a"]}),
    ],
)
def test_an_outcome_of_another_type_is_a_fault_of_the_model(url: str, body: Any) -> None:
    with pytest.raises(ModelFailed, match="the service answers no"):
        answer(read_request(url, body), ["text"], 0, STAMP)


def test_the_error_of_a_row_is_that_of_its_request() -> None:
    with pytest.raises(QueueFull):
        answer(read_request(EMBEDDINGS, {"input": "a"}), [QueueFull("full")], 0, STAMP)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (5, "not a JSON object"),
        ({"method": "POST", "url": EMBEDDINGS, "body": {}}, "custom_id"),
        ({"custom_id": "a", "method": "GET", "url": EMBEDDINGS, "body": {}}, "method"),
        ({"custom_id": "a", "method": "POST", "url": "/v1/images", "body": {}}, "/v1/images"),
        ({"custom_id": "a", "method": "POST", "url": EMBEDDINGS, "body": 5}, "body"),
        ({"custom_id": "a", "method": "POST", "url": EMBEDDINGS, "body": {"input": "a"}, "more": 1}, "more"),
    ],
)
def test_a_line_that_is_no_request_is_its_own_error(line: Any, message: str) -> None:
    request = read_line(line)

    assert isinstance(request.call, InvalidRequest)
    assert message in str(request.call)


def test_lines_of_a_batch_have_openais_shape() -> None:
    good: Any = write_line("1f", "mine", {"object": "list"})
    bad: Any = write_line("1f", "mine", QueueFull("full"))
    unread: Any = write_line("1f", None, InvalidRequest("no JSON"))

    response = {"status_code": 200, "request_id": "req_1f", "body": {"object": "list"}}
    assert good == {"id": "batch_req_1f", "custom_id": "mine", "response": response, "error": None}
    assert (bad["response"]["status_code"], bad["error"]) == (429, None)
    assert bad["response"]["body"]["error"]["code"] == "queue_full"
    assert (unread["response"], unread["error"]["code"]) == (None, "invalid_request")


def fields_of(text: Generated) -> dict[str, Any]:
    return {name: getattr(text, name) for name in text.__dataclass_fields__}
