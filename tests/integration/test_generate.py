"""`generate` and `chat` over a real server: what travels, what comes back, in both clients and in other processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support import eventually
from workers import LONG_S
from writer import Writer, register

from millstream.broker.contract.errors import (
    Cancelled,
    InputTooLong,
    InvalidRequest,
    ModelFailed,
    PartialFailure,
    UnknownService,
)
from millstream.broker.contract.generation import Generation, Logprob, Usage
from millstream.broker.contract.job import Json, Reply
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client, Generated, TextDelta

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1}
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a mill?"}]
TOOL = {"type": "function", "function": {"name": "grind", "parameters": {"type": "object"}}}

Open = Callable[..., Writer]


@pytest.fixture
def writer(connection: Connection, service: str) -> Iterator[Open]:
    """Registers the test's service as one of type llm; its only worker is the test."""

    def open_writer(consumer: str = "w1", **runtime: object) -> Writer:
        register(connection, service, kind="llm", **runtime)
        opened = Writer(connection, service, consumer)
        opened.live()
        return opened

    yield open_writer
    connection.client.srem("ms:services", service)


def result(text: str, reason: str = "stop", **fields: Any) -> Json:
    return Generation(text, reason, Usage(3, 2, 1), 7)._replace(**fields).json()


def answering(worker: Writer, *values: Json, fingerprint: str = "weights") -> threading.Thread:
    """Answers the next jobs from a thread, each with one of `values`, in the order in which it takes them."""

    def answer() -> None:
        for value in values:
            worker.take()
            worker.answer(Reply(values=[value], tokens=5, timings={"queue": 1.0}, fingerprint=fingerprint))

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


# -- what travels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "row", "options"),
    [
        (lambda client, **named: client.generate("a mill", **named), "a mill", {}),
        (lambda client, **named: client.generate([5, 6, 7], **named), {"token_ids": [5, 6, 7]}, {}),
        (lambda client, **named: client.generate(np.array([5, 6]), **named), {"token_ids": [5, 6]}, {}),
        (lambda client, **named: client.chat(MESSAGES, **named), {"messages": MESSAGES}, {}),
        (
            lambda client, **named: client.chat(tuple(MESSAGES), tools=(TOOL,), **named),
            {"messages": MESSAGES, "tools": [TOOL]},
            {},
        ),
        (
            lambda client, **named: client.generate(
                "a",
                max_tokens=np.int64(5),
                temperature=0,
                stop=("\n",),
                stop_token_ids=np.array([2]),
                logit_bias={12: -100},
                response_format={"type": "json_object"},
                top_k=None,
                presence_penalty=0.0,
                **named,
            ),
            "a",
            {
                "max_tokens": 5,
                "temperature": 0,
                "stop": ["\n"],
                "stop_token_ids": [2],
                "logit_bias": {"12": -100},
                "response_format": {"type": "json_object"},
            },
        ),
    ],
)
def test_a_prompt_is_one_row_and_options_are_those_that_were_given(
    client: Client, service: str, writer: Open, call: Callable[..., Generated], row: Json, options: dict[str, Json]
) -> None:
    worker = writer()
    thread = threading.Thread(target=lambda: call(client, service=service))
    thread.start()
    rows, sent = worker.take()
    worker.answer(Reply(values=[result("text")]))
    thread.join(LONG_S)

    job = worker.claim.job
    assert job
    assert (rows, sent, job.op, job.rows) == ([row], options, "generate", 1)


def test_a_result_has_all_that_the_worker_gave(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    logprobs = (Logprob("a", -0.5, (("a", -0.5), ("b", -1.0))),)
    calls = ({"name": "grind", "arguments": {"corn": 1}},)
    thread = answering(worker, result("a mill", "length", logprobs=logprobs, tool_calls=calls))

    got = client.generate("x", service=service, timeout=LONG_S, tenant="t", priority="realtime")

    thread.join(LONG_S)
    assert (got.text, got.finish_reason, got.usage, got.seed, got.version) == ("a mill", "length", USAGE, 7, "weights")
    assert (got.logprobs, got.tool_calls) == (logprobs, calls)
    assert got.timings["queue"] == 1.0
    assert got.timings["total"] > 0
    assert worker.claim.job
    assert worker.claim.job.tenant == "t"


def test_a_list_gives_a_list_in_order_and_each_prompt_is_a_job_of_its_own(
    client: Client, service: str, writer: Open
) -> None:
    worker = writer(batch_size=8)
    prompts = ["b" * number for number in range(1, 6)]

    def echo() -> None:
        for number in range(5):
            (row,), _ = worker.take()
            value = result(f"{row}!")
            # Weights that change in the middle are no fault: each text names its own.
            worker.answer(Reply(values=[value], fingerprint=f"w{number % 2}"))

    thread = threading.Thread(target=echo)
    thread.start()
    got = client.generate(prompts, service=service)
    thread.join(LONG_S)

    assert [each.text for each in got] == [f"{prompt}!" for prompt in prompts]
    assert {each.version for each in got} == {"w0", "w1"}
    assert list(client.generate(list[str](), service=service)) == []


def test_a_prompt_that_fails_does_not_affect_the_others(client: Client, service: str, writer: Open) -> None:
    worker = writer()

    def answer() -> None:
        for _ in range(2):
            (row,), _ = worker.take()
            if row == "long":
                worker.fail(InputTooLong("9 tokens, the model reads 8"))
            else:
                worker.answer(Reply(values=[result("text")]))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(PartialFailure) as caught:
        client.generate(["long", "", "good"], service=service)
    thread.join(LONG_S)

    assert {row: type(error) for row, error in caught.value.errors.items()} == {0: InputTooLong, 1: InvalidRequest}
    first, second, third = caught.value.results
    assert (first, second) == (None, None)
    assert isinstance(third, Generated)
    assert third.text == "text"


@pytest.mark.parametrize("value", [5, {"text": "a"}, {"text": "a", "finish_reason": "stop", "usage": [1]}])
def test_a_result_of_another_shape_is_the_models_failure(
    client: Client, service: str, writer: Open, value: Json
) -> None:
    thread = answering(writer(), value)

    with pytest.raises(ModelFailed, match="not a text"):
        client.generate("a", service=service)
    thread.join(LONG_S)


def test_without_a_service_the_only_one_of_type_llm_is_called(
    client: Client, connection: Connection, service: str, writer: Open
) -> None:
    # As a name is left whose record was deleted by hand.
    connection.client.sadd("ms:services", service)
    with pytest.raises(UnknownService, match="no llm service"):
        client.generate("a")
    worker = writer()
    thread = answering(worker, result("one"), result("two"))

    assert client.generate("a").text == "one"
    assert [delta.text for delta in client.chat_stream(MESSAGES)] == ["two", ""]
    thread.join(LONG_S)


def test_other_forms_of_a_call_give_the_same_results(client: Client, service: str, writer: Open) -> None:
    thread = answering(writer(), *[result(f"text {number}") for number in range(5)])

    assert client.call(service, {"messages": MESSAGES}).text == "text 0"
    (submitted,) = client.submit(service, ["a"], max_tokens=3).result(LONG_S)
    assert isinstance(submitted, Generated)
    assert submitted.text == "text 1"
    assert [each.text for each in client.map(service, ["a", "b", "c"], temperature=0.5)] == [
        "text 2",
        "text 3",
        "text 4",
    ]
    thread.join(LONG_S)


def test_a_prompt_of_another_shape_is_refused_before_it_is_sent(client: Client, service: str, writer: Open) -> None:
    worker = writer()

    payloads: list[Any] = [5, {"messages": []}, {"messages": [{"role": "miller", "content": "a"}]}, {"token_ids": [-1]}]
    for payload in payloads:
        with pytest.raises(InvalidRequest):
            client.submit(service, [payload]).result(LONG_S)
        with pytest.raises(InvalidRequest):
            client.submit_detached(service, [payload])
    with pytest.raises(InvalidRequest, match="no option 'colour'"):
        client.submit(service, ["a"], colour="blue")
    assert worker.queue.depth() == 0


def test_a_text_that_its_worker_ends_at_the_deadline_is_a_result(client: Client, service: str, writer: Open) -> None:
    worker = writer()

    def answer() -> None:
        worker.take()
        worker.write("the mill")
        threading.Event().wait(1.1)
        worker.answer(Reply(values=[result("the mill", "deadline")]))

    thread = threading.Thread(target=answer)
    thread.start()
    got = client.generate("a", service=service, timeout=1.0)
    thread.join(LONG_S)

    assert (got.text, got.finish_reason) == ("the mill", "deadline")


# -- streams -------------------------------------------------------------------------------------------------------


def test_pieces_come_as_they_are_written_and_the_last_one_has_reason_and_usage(
    client: Client, service: str, writer: Open
) -> None:
    worker = writer()
    stream = client.chat_stream(MESSAGES, service=service, max_tokens=2)
    rows, options = worker.take()
    worker.write("the ", "mïll ")
    first = next(stream)
    worker.write("🌊")
    second = next(stream)
    before_the_end = stream.generated
    worker.answer(Reply(values=[result("the mïll 🌊", "length")], fingerprint="weights"))

    assert (rows, options) == ([{"messages": MESSAGES}], {"max_tokens": 2})
    assert [first, second, *stream] == [TextDelta("the mïll "), TextDelta("🌊"), TextDelta("", "length", USAGE)]
    assert before_the_end is None
    assert stream.generated
    assert (stream.generated.text, stream.generated.version, stream.generated.seed) == ("the mïll 🌊", "weights", 7)
    assert (list(stream), stream.text) == ([], "the mïll 🌊")


def test_leaving_the_block_cancels_the_job(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    with client.generate_stream("a", service=service) as stream:
        worker.take()
        worker.write("ab")
        first = next(stream)

    eventually(lambda: worker.claim.address.name in worker.live())
    with pytest.raises(Cancelled):
        next(stream)
    assert (first.text, stream.text, stream.generated) == ("ab", "ab", None)


def test_the_async_client_does_all_that_too(server: EmbeddedServer, service: str, writer: Open) -> None:
    worker = writer(batch_size=8)
    thread = answering(worker, *[result(f"text {number}") for number in range(5)])

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            assert (await client.generate("a")).text == "text 0"
            assert (await client.chat(MESSAGES, tools=[TOOL], service=service)).usage == USAGE
            assert [each.text async for each in client.map(service, ["a"])] == ["text 2"]
            deltas = [delta async for delta in client.generate_stream("a")]
            assert deltas == [TextDelta("text 3"), TextDelta("", "stop", USAGE)]
            async with client.chat_stream(MESSAGES, service=service) as stream:
                assert (await anext(stream)).text == "text 4"
                assert (await anext(stream)).finish_reason == "stop"
                assert [delta async for delta in stream] == []
            assert stream.generated
            with pytest.raises(InvalidRequest):
                await client.generate("a", max_tokens=0)

    asyncio.run(run())
    thread.join(LONG_S)


def test_leaving_an_async_block_cancels_the_job(server: EmbeddedServer, service: str, writer: Open) -> None:
    worker = writer()

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            async with client.generate_stream("a") as stream:
                await asyncio.to_thread(worker.take)
                await asyncio.to_thread(worker.write, "ab")
                assert await anext(stream) == TextDelta("ab")
            await asyncio.to_thread(eventually, lambda: worker.claim.address.name in worker.live())

    asyncio.run(run())


# -- detached ------------------------------------------------------------------------------------------------------


def test_a_detached_text_can_be_read_while_it_grows_and_its_result_from_another_process(
    client: Client, server: EmbeddedServer, service: str, writer: Open
) -> None:
    worker = writer()
    job = client.submit_detached(service, [{"messages": MESSAGES}], max_tokens=4)
    with Client(server.url) as other:
        found = other.job(job.id)
        worker.take()
        worker.write("the ", "mill")
        so_far = found.partial()
        worker.answer(Reply(values=[result("the mill turns")], fingerprint="weights"))

        (theirs,) = found.result(LONG_S)
        (ours,) = job.result(LONG_S)

        assert so_far == "the mill"
        assert isinstance(theirs, Generated)
        assert (theirs.text, theirs.usage, theirs.version) == ("the mill turns", USAGE, "weights")
        assert theirs == ours
        assert found.partial() == "the mill turns"
        assert [each.text for each in found.outcomes()] == ["the mill turns"]  # type: ignore[union-attr]


def test_a_detached_result_outlives_its_service(
    client: Client, server: EmbeddedServer, connection: Connection, service: str, writer: Open
) -> None:
    worker = writer()
    job = client.submit_detached(service, ["a"])
    worker.take()
    worker.answer(Reply(values=[result("text")]))
    connection.client.delete(worker.queue.keys.spec())
    connection.client.srem("ms:services", service)

    with Client(server.url) as other:
        assert other.job(job.id).result(LONG_S) == [result("text")]
