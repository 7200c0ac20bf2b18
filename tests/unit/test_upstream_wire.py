"""What servers answer is read with distrust: whatever comes is an answer or a fault, and ends no engine."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.generation import GenerateOptions, Generation
from millstream.broker.contract.job import Json
from millstream.broker.contract.partial import Record, encode_record
from millstream.broker.contract.prompt import Prompt
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.engines.upstream_rows import Embedding, Item, Reranking
from millstream.worker.engines.upstream_text import Event, Ollama, OpenAI, Route, Text, seed_of
from millstream.worker.engines.upstream_wire import Fault, Server, clean, error_of, fault_of
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.batcher import Row

KEYS = st.sampled_from(
    [
        "choices",
        "delta",
        "content",
        "text",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "index",
        "usage",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "logprobs",
        "tokens",
        "token_logprobs",
        "top_logprobs",
        "token",
        "logprob",
        "message",
        "response",
        "done",
        "done_reason",
        "data",
        "embedding",
        "embeddings",
        "results",
        "relevance_score",
        "score",
        "prompt_tokens_details",
        "cached_tokens",
        "error",
        "code",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 600)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["stop", "length", "abort", "\ud83d", "AAAAAAAA"])
)
ANY = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=25
)
ROUTES: list[Route] = [OpenAI(), Ollama()]


def text(prompt: Json = "a", **options: Json) -> Text:
    made = Text(Prompt.read(prompt), GenerateOptions.read(options), "m")
    made.begin("job", [])
    return made


@pytest.mark.parametrize("route", ROUTES, ids=["openai", "ollama"])
@given(events=st.lists(st.dictionaries(KEYS, ANY, max_size=5), max_size=4))
def test_any_events_are_a_text_or_a_fault(route: Route, events: list[dict[str, Json]]) -> None:
    growing = text(logprobs=1) if isinstance(route, OpenAI) else text()
    growing.start(may_continue=True)
    with suppress(Fault):
        for event in events:
            if fault := error_of(event):
                raise fault
            if record := growing.add(route.read(growing, event)):
                encode_record(record)
    result = growing.result("" if growing.finish else "deadline")

    assert Generation.read(cast(Json, json.loads(json.dumps(result.json())))) == result


@pytest.mark.parametrize("backend", ["openai", "tei", "ollama"])
@given(answer=ANY)
def test_any_answer_is_vectors_or_a_fault(backend: str, answer: Json) -> None:
    rows = [Row(1, (0,), "a", at, Prepared(1, Item("x", EmbedOptions()))) for at in range(2)]
    with suppress(Fault):
        assert len(Embedding(rows, backend, "m").finish(answer)) == 2


@pytest.mark.parametrize("backend", ["openai", "tei"])
@given(answer=ANY)
def test_any_answer_is_scores_or_a_fault(backend: str, answer: Json) -> None:
    rows = [Row(1, (0,), "a", at, Prepared(1, Item("x", RerankOptions("q")))) for at in range(2)]
    with suppress(Fault):
        assert len(Reranking(rows, backend, "m").finish(answer)) == 2


@given(st.integers(400, 599), st.binary(max_size=200), st.none() | st.text(max_size=5))
def test_any_error_is_a_fault_with_a_short_message(status: int, body: bytes, retry: str | None) -> None:
    fault = fault_of(status, body, retry)

    assert len(fault.message) < 400
    assert 0 <= fault.retry_s < 86_400


@given(st.lists(st.text(st.characters(), max_size=5), max_size=8), st.integers(0, 8), st.booleans())
def test_a_text_in_two_requests_is_shown_once_and_in_order(pieces: list[str], cut: int, continues: bool) -> None:
    whole, growing = [clean(piece) for piece in pieces], text()
    records: list[Record] = []

    def run(parts: list[str]) -> None:
        growing.start(may_continue=continues)
        for part in parts:
            if record := growing.add(Event(part)):
                records.append(record)

    run(pieces[:cut])
    successor = text()
    successor.begin("job", records)
    growing = successor
    run(pieces[cut:] if successor.shown and continues else pieces)

    assert "".join(record.text for record in records) == growing.shown == "".join(whole)
    assert not growing.has_diverged


def test_a_body_says_what_the_caller_asked_for() -> None:
    chat = text(
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
        max_tokens=5,
        temperature=0.0,
        stop=["x"],
        presence_penalty=0.5,
        response_format={"type": "json_schema", "schema": {"type": "object"}},
        logprobs=2,
    )
    chat.start(may_continue=True)
    path, body, _ = OpenAI().call(chat, Server("vllm"))

    assert path == "/chat/completions"
    assert {key: body[key] for key in ("max_tokens", "temperature", "stop", "presence_penalty", "top_logprobs")} == {
        "max_tokens": 5,
        "temperature": 0.0,
        "stop": ["x"],
        "presence_penalty": 0.5,
        "top_logprobs": 2,
    }
    assert body["seed"] == seed_of("job")
    assert cast(dict[str, Json], body["response_format"])["type"] == "json_schema"
    assert body["tools"]


def test_a_completion_without_a_limit_says_so() -> None:
    plain = text("a")
    plain.start(may_continue=True)

    assert OpenAI().call(plain, Server()).body["max_tokens"] is None
    assert cast(dict[str, Json], Ollama().call(plain, Server()).body["options"])["num_predict"] == -1


@pytest.mark.parametrize(
    ("route", "prompt", "options"),
    [
        (OpenAI(), "a", {"response_format": {"type": "grammar", "grammar": "start: a"}}),
        (OpenAI(), "a", {"response_format": {"type": "regex", "pattern": "a"}}),
        (Ollama(), {"token_ids": [1]}, {}),
        (Ollama(), "a", {"logprobs": 0}),
        (Ollama(), "a", {"ignore_eos": True}),
    ],
)
def test_what_a_server_would_ignore_is_refused(route: Route, prompt: Json, options: dict[str, Json]) -> None:
    with pytest.raises(InvalidRequest):
        route.check(Prompt.read(prompt), GenerateOptions.read(options), Server("someone"))


def test_a_tool_call_is_put_together_from_its_parts() -> None:
    growing = text({"messages": [{"role": "user", "content": "hi"}]})
    growing.start(may_continue=True)
    for name, arguments in (("f", '{"a"'), ("", ": 1}")):
        call: Json = {"index": 0, "function": {"name": name, "arguments": arguments}}
        OpenAI().read(growing, {"choices": [{"delta": {"tool_calls": [call]}}]})

    assert growing.result("stop").tool_calls == ({"name": "f", "arguments": {"a": 1}},)
