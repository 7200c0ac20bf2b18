"""`generate` and `chat` as programs call them: arguments, results and errors, against the fake client."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import pytest

from millstream import client as module
from millstream.broker.contract.errors import InvalidRequest, ModelFailed, PartialFailure, QueueFull
from millstream.broker.contract.generation import GenerateOptions
from millstream.broker.contract.job import Json
from millstream.client import AsyncClient, Client, Generated, TextDelta
from millstream.client.call_options import CallOptions
from millstream.client.generate import GenerateKeywords, read_keywords, read_prompts
from millstream.client.testing import FAKE_VERSION, GENERATOR, AsyncFakeClient, FakeClient

MESSAGES = [{"role": "user", "content": "a mill on a stream"}]
METHODS = ("generate", "chat", "generate_stream", "chat_stream")


@pytest.fixture
def fake() -> FakeClient:
    return FakeClient()


# -- arguments -----------------------------------------------------------------------------------------------------


def test_the_keywords_are_those_of_a_call_and_of_the_model() -> None:
    of_call = {"service", *CallOptions._fields} - {"options", "op", "webhook"}

    assert set(get_type_hints(GenerateKeywords)) == {*of_call, *GenerateOptions._fields}


@pytest.mark.parametrize("method", METHODS)
def test_both_clients_and_the_module_have_the_same_parameters(method: str) -> None:
    blocking, awaited = (inspect.signature(getattr(each, method)) for each in (Client, AsyncClient))

    assert blocking.parameters == awaited.parameters
    assert callable(getattr(module, method))
    assert method in module.__all__


@pytest.mark.parametrize(
    ("prompt", "rows", "single"),
    [
        ("a", ["a"], True),
        (np.array("a"), ["a"], True),
        ([1, 2], [{"token_ids": [1, 2]}], True),
        ((1, 2), [{"token_ids": [1, 2]}], True),
        (np.array([1, 2]), [{"token_ids": [1, 2]}], True),
        ([np.int64(1), 2], [{"token_ids": [1, 2]}], True),
        ([1, "a"], [{"token_ids": [1, "a"]}], True),
        (["a", "b"], ["a", "b"], False),
        (("a",), ["a"], False),
        ([[1, 2], (3,), np.array([4])], [{"token_ids": [1, 2]}, {"token_ids": [3]}, {"token_ids": [4]}], False),
        (np.array([[1, 2], [3, 4]]), [{"token_ids": [1, 2]}, {"token_ids": [3, 4]}], False),
        (["a", [1]], ["a", {"token_ids": [1]}], False),
        ([], [], False),
    ],
)
def test_a_prompt_is_a_string_or_token_ids_and_a_list_of_them_is_a_list(
    prompt: object, rows: list[Json], single: bool
) -> None:
    assert read_prompts(prompt) == (rows, single)


def test_values_are_sent_as_json_has_them() -> None:
    given: dict[str, Any] = {
        "service": "chat",
        "priority": "realtime",
        "tenant": "t",
        "max_tokens": np.int64(5),
        "stop": ("a", "b"),
        "stop_token_ids": np.array([1, 2]),
        "logit_bias": {np.int64(3): np.float32(0.5)},
        "temperature": None,
        "ignore_eos": False,
    }

    service, opts = read_keywords(given)

    assert (service, opts.priority, opts.tenant, opts.op) == ("chat", "realtime", "t", "generate")
    assert opts.options == {"max_tokens": 5, "stop": ["a", "b"], "stop_token_ids": [1, 2], "logit_bias": {"3": 0.5}}
    assert type(opts.options["max_tokens"]) is int


WRONG: list[Callable[[Any], object]] = [
    lambda fake: fake.generate("a", colour="blue"),
    lambda fake: fake.generate("a", max_tokens=0),
    lambda fake: fake.generate("a", temperature=float("nan")),
    lambda fake: fake.generate("a", timeout=-1),
    lambda fake: fake.generate("a", priority="soon"),
    lambda fake: fake.generate(""),
    lambda fake: fake.generate(5),
    lambda fake: fake.generate(None),
    lambda fake: fake.generate({"text": "a"}),
    lambda fake: fake.generate([1, -2]),
    lambda fake: fake.generate([1, True]),
    lambda fake: fake.generate("\ud800"),
    lambda fake: fake.generate("a", service="embed"),
    lambda fake: fake.generate("a", service="rerank"),
    lambda fake: fake.generate_stream(["a"]),
    lambda fake: fake.generate_stream([]),
    lambda fake: fake.chat("a"),
    lambda fake: fake.chat([]),
    lambda fake: fake.chat(["a"]),
    lambda fake: fake.chat([{"role": "miller", "content": "a"}]),
    lambda fake: fake.chat([{"role": "user"}]),
    lambda fake: fake.chat(MESSAGES, tools="grind"),
    lambda fake: fake.chat(MESSAGES, tools=["grind"]),
    lambda fake: next(fake.chat_stream([{"role": "user", "content": 5}])),
    lambda fake: fake.chat(MESSAGES, response_format={"type": "json_schema", "schema": {"deep": object()}}),
]


@pytest.mark.parametrize("call", WRONG)
def test_what_is_wrong_is_an_invalid_request(fake: FakeClient, call: Callable[[Any], object]) -> None:
    with pytest.raises(InvalidRequest):
        call(fake)


def test_a_caller_may_change_its_arguments_afterwards(fake: FakeClient) -> None:
    messages = [{"role": "user", "content": "before"}]
    stream = fake.chat_stream(messages)
    messages[0]["content"] = "after"

    assert "".join(delta.text for delta in stream) == "before"


# -- results -------------------------------------------------------------------------------------------------------


def test_the_fake_generates_the_text_of_the_prompt(fake: FakeClient) -> None:
    text = fake.generate("a mill on a stream", max_tokens=3, seed=9)
    answer = fake.chat(MESSAGES)

    assert (text.text, text.finish_reason, text.seed, text.version) == ("a mill on ", "length", 9, FAKE_VERSION)
    assert text.usage == {"prompt_tokens": 5, "completion_tokens": 3, "cached_tokens": 0}
    assert (answer.text, answer.finish_reason, answer.seed) == ("a mill on a stream", "stop", 0)
    assert fake.generate([7, 8]).text == "7 8"
    assert fake.chat([{"role": "user", "content": [{"type": "text", "text": "part"}]}]).text == "part"
    assert [call.service for call in fake.calls] == [GENERATOR] * 4


def test_answers_handlers_and_errors_replace_it() -> None:
    def grind(prompts: list[Any]) -> list[Any]:
        return [{"text": "", "finish_reason": "stop", "tool_calls": [{"name": "grind", "arguments": {}}]}]

    fake = FakeClient(
        answers=lambda text: text.upper(),
        errors={"bad": ModelFailed("a stone")},
        services={"tools": "llm"},
        handlers={"tools": grind},
    )

    assert fake.generate("a mill").text == "A MILL"
    assert fake.chat(MESSAGES, service="tools").tool_calls == ({"name": "grind", "arguments": {}},)
    with pytest.raises(PartialFailure) as caught:
        fake.generate(["good", "bad"])
    assert [getattr(each, "text", None) for each in caught.value.results] == ["GOOD", None]
    fake.fail(QueueFull("full"))
    with pytest.raises(QueueFull):
        fake.chat(MESSAGES)


def test_a_list_of_prompts_and_the_other_forms_give_results_in_order(fake: FakeClient) -> None:
    prompts = [f"prompt {number}" for number in range(40)]

    assert [each.text for each in fake.generate(prompts)] == prompts
    assert [each.text for each in fake.map(GENERATOR, prompts, window=8)] == prompts
    detached = fake.submit_detached(GENERATOR, ["a mill"])
    (found,) = fake.job(detached.id).result()
    assert isinstance(found, Generated)
    assert (found.text, fake.job(detached.id).partial()) == ("a mill", "a mill")
    assert list(fake.generate(list[str]())) == []


def test_a_stream_gives_pieces_and_then_reason_and_usage(fake: FakeClient) -> None:
    with fake.generate_stream("a mill") as stream:
        deltas = list(stream)

    usage = {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0}
    assert deltas == [TextDelta("a "), TextDelta("mill"), TextDelta("", "stop", usage)]
    assert stream.generated
    assert (stream.text, stream.generated.text, stream.generated.seed) == ("a mill", "a mill", 0)
    assert len(stream.id) == 32


def test_a_model_for_tests_that_streams_may_generate(fake: FakeClient) -> None:
    fake = FakeClient(services={"echo": "echo-stream"})

    text = fake.generate("a mill", service="echo")

    assert (text.text, text.usage, text.seed) == ("a mill", {}, None)
    assert [delta.text for delta in fake.generate_stream("a mill", service="echo")] == ["a ", "mill", ""]


def test_a_result_can_be_written_as_json(fake: FakeClient) -> None:
    text = fake.generate("a mill")

    assert text.json() == {
        "text": "a mill",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0},
        "seed": 0,
        "version": FAKE_VERSION,
        "fingerprint": FAKE_VERSION,
        "logprobs": None,
        "tool_calls": [],
        "timings": dict(text.timings),
    }


def test_the_fake_for_asyncio_and_the_module_do_all_that_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with AsyncFakeClient() as fake:
            assert (await fake.generate("a mill")).text == "a mill"
            assert [each.text for each in await fake.generate(["a", "b"])] == ["a", "b"]
            assert (await fake.chat(MESSAGES)).text == MESSAGES[0]["content"]
            assert [delta.text async for delta in fake.generate_stream("a mill")] == ["a ", "mill", ""]
            async with fake.chat_stream(MESSAGES) as stream:
                assert [delta.finish_reason async for delta in stream][-1] == "stop"
            with pytest.raises(InvalidRequest):
                fake.generate_stream(["a"])  # type: ignore[list-item]

    asyncio.run(use())
    fake = FakeClient()
    monkeypatch.setattr(module, "default", lambda: fake)
    assert module.generate("a", max_tokens=1).text == module.chat([{"role": "user", "content": "a"}]).text == "a"
    assert [delta.text for delta in module.generate_stream("a")] == ["a", ""]
    assert [delta.text for delta in module.chat_stream([{"role": "user", "content": "a"}])] == ["a", ""]
