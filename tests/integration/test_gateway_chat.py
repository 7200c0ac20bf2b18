"""Generated texts over HTTP, with OpenAI's own client library: whole, streamed, broken off, left by their callers."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateways import LONG_S, Running, acting, events, gateway
from support import eventually
from workers import remove
from writer import Writer, register

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.generation import Generation, Logprob, Usage
from millstream.broker.contract.job import Reply
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection

TESTS = Path(__file__).parents[1]
HELLO: Any = [{"role": "user", "content": "the mill turns in the stream"}]
SAID = "1 the mill turns in the stream"
TOOLS: Any = [{"type": "function", "function": {"name": "grind", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def running(server: EmbeddedServer) -> Iterator[Running]:
    with gateway(server.url) as found:
        yield found


@pytest.fixture(scope="module")
def chat(server: EmbeddedServer) -> Iterator[str]:
    """A language model that says its prompt word by word, in a worker process."""
    name = f"test-chat-{uuid.uuid4().hex[:8]}"
    model = ModelSpec(type="llm", model_name="echo,sleep:0.005")
    connection = Connection(server.url)
    Registry(connection).push([ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime(batch_size=8))])
    process = subprocess.Popen([sys.executable, str(TESTS / "prompt_echo.py"), server.url, name])
    try:
        eventually(lambda: Inspector(connection).services([name])[0].workers, within_s=LONG_S)
        yield name
    finally:
        process.terminate()
        process.wait(LONG_S)
        connection.close()
        remove(server.url, name)


@pytest.fixture
def writer(connection: Connection, service: str) -> Iterator[Writer]:
    """A service of the type llm whose worker is the test."""
    register(connection, service, kind="llm", max_queue_size=1)
    yield Writer(connection, service)
    connection.client.srem("ms:services", service)


@pytest.fixture
def sdk(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# -- whole texts -----------------------------------------------------------------------------------------------------


def test_a_chat_has_a_message_a_reason_and_usage(sdk: openai.OpenAI, chat: str) -> None:
    found = sdk.chat.completions.create(model=chat, messages=HELLO, max_completion_tokens=3)

    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "1 the mill ", "length")
    assert found.usage
    assert (found.usage.completion_tokens, found.model, found.object) == (3, chat, "chat.completion")


def test_completions_have_a_choice_for_each_prompt(sdk: openai.OpenAI, chat: str) -> None:
    found = sdk.completions.create(model=chat, prompt=["a mill", "b"])

    assert [each.text for each in found.choices] == ["a mill", "b"]


def test_tools_logprobs_and_our_own_fields_reach_the_worker(
    running: Running, writer: Writer, sdk: openai.OpenAI
) -> None:
    name, answers = writer.queue.keys.service, list[Any]()

    def ask() -> None:
        answers.append(
            sdk.chat.completions.create(
                model=name,
                messages=HELLO,
                tools=TOOLS,
                logprobs=True,
                top_logprobs=1,
                stop=["x"],
                response_format={"type": "json_object"},
                extra_body={"priority": "realtime", "top_k": 5},
            )
        )

    with acting(ask):
        rows, options = writer.take()
        assert writer.claim.address.name.startswith("1:")
        call: Any = {"name": "grind", "arguments": {"n": 1}}
        logprobs = (Logprob("a", -0.5, (("a", -0.5),)),)
        text = Generation("a", "stop", Usage(3, 1), 7, logprobs, (call,))
        writer.answer(Reply(values=[text.json()], tokens=4))

    assert rows == [{"messages": HELLO, "tools": TOOLS}]
    given = {"stop": ["x"], "top_k": 5, "logprobs": 1, "response_format": {"type": "json_object"}}
    assert options == given
    (choice,) = answers[0].choices
    assert (choice.finish_reason, choice.message.tool_calls[0].function.name) == ("tool_calls", "grind")
    assert choice.logprobs.content[0].logprob == -0.5


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_text_in_pieces_and_the_usage_in_the_end(sdk: openai.OpenAI, chat: str) -> None:
    chunks = list(
        sdk.chat.completions.create(model=chat, messages=HELLO, stream=True, stream_options={"include_usage": True})
    )

    *pieces, ending, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == SAID
    assert len(pieces) > 1
    assert ending.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage
    assert usage.usage.completion_tokens == len(SAID.split())
    assert {each.object for each in chunks} == {"chat.completion.chunk"}
    assert len({each.id for each in chunks}) == 1


def test_a_stream_ends_with_done(running: Running, chat: str) -> None:
    answer = running.post("/v1/completions", {"model": chat, "prompt": "a mill", "stream": True})

    sent = events(answer)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "".join(each["choices"][0]["text"] for each in sent[:-1]) == "a mill"
    assert sent[-1] == "[DONE]"


def test_an_error_before_the_first_piece_has_its_status(writer: Writer, sdk: openai.OpenAI) -> None:
    name = writer.queue.keys.service
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model=name, messages=HELLO, stream=True, top_p=7)
    with (
        acting(lambda: writer.take() and writer.fail(ModelFailed("a stone"))),
        pytest.raises(openai.InternalServerError) as failed,
    ):
        sdk.chat.completions.create(model=name, messages=HELLO, stream=True)

    assert (refused.value.param, failed.value.code) == ("top_p", "model_failed")


def test_an_error_in_mid_stream_raises_in_the_library(writer: Writer, sdk: openai.OpenAI) -> None:
    pieces = list[str]()

    def read() -> None:
        for chunk in sdk.chat.completions.create(model=writer.queue.keys.service, messages=HELLO, stream=True):
            pieces.append(chunk.choices[0].delta.content or "")

    def write() -> None:
        writer.take()
        writer.write("the mill ")
        eventually(lambda: "".join(pieces) == "the mill ")
        writer.fail(ModelFailed("a stone"))

    with acting(write), pytest.raises(openai.APIError, match="a stone") as caught:
        read()

    assert caught.value.code == "model_failed"


def test_a_stream_whose_gateway_stops_ends_with_an_error(
    server: EmbeddedServer, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millstream.gateway.api.streaming.PING_S", 0.05)
    with gateway(server.url, drain_s=1.0) as own:
        body = {"model": writer.queue.keys.service, "messages": HELLO, "stream": True}
        with httpx.stream("POST", f"{own.url}/v1/chat/completions", json=body, timeout=LONG_S) as answer:
            lines = answer.iter_lines()
            writer.take()
            writer.write("the mill ")
            assert any("the mill" in line for line in lines)
            own.server.stop()
            rest = "".join(lines)

    assert "gateway_stopping" in rest
    assert "[DONE]" not in rest
    writer.live()


def test_comments_keep_a_silent_stream_alive(writer: Writer, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.gateway.api.streaming.PING_S", 0.05)
    body = {"model": writer.queue.keys.service, "messages": HELLO, "stream": True}

    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=LONG_S) as answer:
        lines = answer.iter_lines()
        writer.take()
        assert sum(next(lines) == ": ping" for _ in range(8)) >= 2
        writer.write("a mill")
        writer.settle()
        rest = [line for line in lines if line.startswith("data: ")]

    assert rest[-1] == "data: [DONE]"


# -- callers who leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_the_job_of_a_caller_who_leaves_is_cancelled(writer: Writer, running: Running, streams: bool) -> None:
    body = {"model": writer.queue.keys.service, "messages": HELLO, "stream": streams}

    with running.send("/v1/chat/completions", body):
        writer.take()
        if streams:
            writer.write("the mill ")

    eventually(lambda: writer.live() != [])


def test_the_job_of_a_caller_who_leaves_during_a_long_prefill_is_cancelled(
    writer: Writer, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millstream.gateway.api.streaming.PING_S", 0.05)
    body = {"model": writer.queue.keys.service, "messages": HELLO, "stream": True}

    with running.send("/v1/chat/completions", body) as connection:
        writer.take()
        # Behind the headers and the first event, however they are cut.
        answer = b""
        while b": ping" not in answer:
            answer += connection.recv(4_096)
            assert len(answer) < 65_536

    eventually(lambda: writer.live() != [])
