"""The fake clients check, split, order and raise as the real ones do, without a server."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    PartialFailure,
    QueueFull,
    ResultExpired,
    UnknownService,
)
from millstream.broker.contract.job import Json
from millstream.client import AsyncClient, Client, Embeddings
from millstream.client.testing import FAKE_VERSION, SERVICE, AsyncFakeClient, FakeClient

LLMS = ("chat", "other")


@pytest.fixture
def fake() -> FakeClient:
    return FakeClient(dim=8)


def upper(text: str) -> Json:
    return text.upper()


def public(cls: type) -> dict[str, object]:
    """Its public methods' signatures, and the names of its public properties."""
    members = {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_") or name == "__enter__"}
    return {name: inspect.signature(each) if callable(each) else type(each) for name, each in members.items()}


@pytest.mark.parametrize(("false", "true"), [(FakeClient, Client), (AsyncFakeClient, AsyncClient)])
def test_a_fake_has_every_method_of_the_client_it_stands_for_with_the_same_signature(false: type, true: type) -> None:
    assert {name: each for name, each in public(false).items() if name not in ("calls", "fail")} == public(true)
    assert issubclass(false, true)


def test_a_text_gets_the_same_unit_vector_each_time_and_others_another(fake: FakeClient) -> None:
    first, second, again = fake.embed(["a", "b", "a"])

    assert np.array_equal(first, again)
    assert not np.allclose(first, second)
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-6)
    assert np.array_equal(FakeClient(dim=8).embed("a"), first)


def test_vectors_do_not_change_from_one_version_to_the_next() -> None:
    expected = [0.6188, -0.4682, -0.1669, -0.6083]

    assert FakeClient(dim=4).embed("a mill").tolist() == pytest.approx(expected, abs=1e-4)


def test_results_have_the_shape_and_the_extras_of_the_real_ones(fake: FakeClient) -> None:
    vectors = fake.embed(["one word", "two more words"])

    assert isinstance(vectors, Embeddings)
    assert vectors.shape == (2, 8)
    assert vectors.dtype == np.float32
    assert vectors.usage["tokens"] == 9
    assert fake.embed("single").shape == (8,)
    assert fake.embed([]).shape == (0, 0)
    assert FakeClient().embed("a").shape == (384,)


def test_a_caller_gives_its_own_answers() -> None:
    fake = FakeClient(answers=upper)

    assert fake.submit("shout", ["a", "b"]).result() == ["A", "B"]
    assert list(fake.map("shout", "abcdefgh", window=4)) == list("ABCDEFGH")


def test_a_long_call_is_answered_in_its_order() -> None:
    rows: list[Json] = [f"row {n} " + "x" * (n % 97) for n in range(20_000)]

    assert FakeClient(answers=upper).submit("shout", rows).result() == [str(row).upper() for row in rows]


@pytest.mark.parametrize(
    "call",
    [
        lambda fake: fake.embed(["a"], priority="soon"),
        lambda fake: fake.embed(["a"], timeout=0),
        lambda fake: fake.embed(["a"], tenant="not a name"),
        lambda fake: fake.embed(["a"], truncate="middle"),
        lambda fake: fake.embed(["a"], input_type="question"),
        lambda fake: fake.embed(["a"], input_type="query", prompt="q: "),
        lambda fake: fake.embed(["a"], prompt="x" * 20_000),
        lambda fake: fake.embed(["a"], dimensions=0),
        lambda fake: fake.submit_detached("embed", ["a"], dimensions=1.5),
        lambda fake: list(fake.map("embed", ["a"], normalize="yes")),
        lambda fake: fake.submit("embed", ["a"], encoding="int8"),
        lambda fake: fake.submit("embed", "text"),
        lambda fake: fake.submit("embed", ["a"], option=object()),
        lambda fake: fake.submit("embed", ["a"], option=float("nan")),
        lambda fake: list(fake.map("embed", ["a"], window=0)),
        lambda fake: list(fake.map("embed", ["a"], results="errors")),
        lambda fake: fake.submit_detached("embed", []),
        lambda fake: fake.submit_detached("embed", ["a", 5]),
        lambda fake: fake.job("9f86d081"),
        lambda fake: fake.job("embed:999999999x1:" + "0" * 32),
    ],
)
def test_arguments_are_checked_as_the_client_checks_them(
    fake: FakeClient, call: Callable[[FakeClient], object]
) -> None:
    with pytest.raises(InvalidRequest):
        call(fake)
    assert fake.calls == []


def test_what_cannot_be_a_service_is_unknown(fake: FakeClient) -> None:
    with pytest.raises(UnknownService):
        fake.submit("no service!", ["a"])


def test_vectors_come_as_they_were_asked_for(fake: FakeClient) -> None:
    whole = np.asarray(fake.embed(["a", "b"]))
    cut = fake.embed(["a", "b"], dimensions=3)
    raw = fake.embed(["a", "b"], dimensions=3, normalize=False)
    half = fake.submit("embed", ["a", "b"], encoding="float16").result()
    (bits, _) = fake.map("embed", ["a", "b"], encoding="binary")

    assert np.allclose(np.linalg.norm(cut, axis=1), 1.0)
    assert np.array_equal(raw, whole[:, :3])
    assert isinstance(half, Embeddings)
    assert half.dtype == np.float16
    assert np.array_equal(half, whole.astype(np.float16))
    assert np.array_equal(bits, np.packbits(whole[0] > 0))


def test_a_service_of_another_kind_may_have_options_of_its_own() -> None:
    assert FakeClient(answers=upper).submit("shout", ["a"], volume=11).result() == ["A"]


def test_embed_says_where_a_service_answers_no_vectors() -> None:
    fake = FakeClient(answers=lambda text: {"indices": [1], "values": [0.5]})

    assert fake.submit("sparse", ["a"]).result() == [{"indices": [1], "values": [0.5]}]
    with pytest.raises(InvalidRequest, match="submit"):
        fake.embed(["a"], service="sparse")
    assert fake.embed([], service="sparse").shape == (0, 0)


def test_texts_can_be_told_to_fail() -> None:
    fake = FakeClient(dim=4, errors={"long": InputTooLong("600 tokens")})

    with pytest.raises(PartialFailure) as caught:
        fake.embed(["a", "long", "b"])
    assert {row: type(error) for row, error in caught.value.errors.items()} == {1: InputTooLong}
    assert np.array_equal(np.asarray(caught.value.results[2]), fake.embed("b"))
    with pytest.raises(InputTooLong):
        fake.embed("long")


def test_answers_may_raise_a_rows_error() -> None:
    def picky(text: str) -> Json:
        if text == "bad":
            raise InvalidRequest("no")
        return text

    outcomes = list(FakeClient(answers=picky).map("s", ["good", "bad"], results="outcomes"))

    assert outcomes[0] == "good"
    assert isinstance(outcomes[1], InvalidRequest)


def test_a_custom_service_is_answered_by_its_function() -> None:
    def double(payloads: list[dict[str, int]]) -> list[Json]:
        return [{"twice": 2 * each["n"]} for each in payloads]

    fake = FakeClient(dim=4, handlers={"double": double, "vectors": lambda payloads: [np.ones(2)] * len(payloads)})

    assert fake.call("double", {"n": 2}) == {"twice": 4}
    assert fake.submit("double", [{"n": 1}, {"n": 2}]).result() == [{"twice": 2}, {"twice": 4}]
    assert fake.call("vectors", None).tolist() == [1, 1]
    assert fake.submit_detached("double", [{"n": 3}]).result() == [{"twice": 6}]
    assert fake.call("embed", "a").shape == (4,)
    outcomes = fake.submit("double", [{"n": 1}, {}, object()]).outcomes()  # type: ignore[list-item]
    assert [type(each) for each in outcomes] == [dict, ModelFailed, InvalidRequest]
    assert fake.calls[0].inputs == [{"n": 2}]


@pytest.mark.parametrize("error", [SystemExit("no"), asyncio.CancelledError("no"), GeneratorExit("no")])
def test_a_function_that_would_end_a_worker_fails_its_payload_alone(error: BaseException) -> None:
    def leave(payloads: list[str]) -> list[str]:
        if "bad" in payloads:
            raise error
        return payloads

    outcomes = FakeClient(handlers={"s": leave}).submit("s", ["a", "bad"]).outcomes()

    assert outcomes[0] == "a"
    assert isinstance(outcomes[1], ModelFailed)


def test_ctrl_c_in_a_function_is_the_tests_own() -> None:
    def interrupted(payloads: list[str]) -> list[str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FakeClient(handlers={"s": interrupted}).call("s", "a")


def test_the_next_calls_can_be_told_to_fail(fake: FakeClient) -> None:
    full = QueueFull("full", retry_after=1.5)
    fake.fail(full, times=4)

    with pytest.raises(QueueFull) as caught:
        fake.embed("a")
    assert caught.value.retry_after == 1.5
    handle = fake.submit("embed", ["a"] * 1_000)
    with pytest.raises(QueueFull):
        handle.result()
    with pytest.raises(QueueFull):
        list(fake.map("embed", ["a"]))
    with pytest.raises(QueueFull):
        fake.submit_detached("embed", ["a"])
    assert fake.embed("a").shape == (8,)


def test_calls_are_kept(fake: FakeClient) -> None:
    fake.embed(["a"], priority="realtime", truncate="end")
    fake.submit("other", ["b", "c"], timeout=3, tenant="t")
    fake.submit_detached("embed", ["d"], idempotency_key="k")

    first, second, third = fake.calls
    assert (first.service, first.inputs, first.opts.priority) == (SERVICE, ["a"], "realtime")
    assert first.opts.options == {"truncate": "end"}
    assert (second.service, second.inputs, second.opts.timeout, second.opts.tenant) == ("other", ["b", "c"], 3, "t")
    assert (third.detached, third.idempotency_key) == (True, "k")


def test_handles_are_the_real_ones(fake: FakeClient) -> None:
    handle = fake.submit("embed", ["a", "b"])

    assert (handle.ready, handle.done(), handle.wait(0), handle.rows_done) == (True, True, True, 2)
    assert not handle.cancel()
    assert len(handle.id) == 32
    assert len(handle.outcomes()) == 2


def test_detached_calls_are_found_by_their_id(fake: FakeClient) -> None:
    detached = fake.submit_detached("embed", ["a", "b"], idempotency_key="k")

    assert fake.submit_detached("embed", ["a", "b"], idempotency_key="k").id == detached.id
    with pytest.raises(InvalidRequest, match="another payload"):
        fake.submit_detached("embed", ["a", "c"], idempotency_key="k")
    found = fake.job(detached.id)
    assert found.done()
    assert np.array_equal(np.asarray(found.result()), fake.embed(["a", "b"]))
    assert not found.cancel()
    with pytest.raises(ResultExpired):
        fake.job(f"embed:1x1:{'0' * 32}").done()


def test_empty_texts_can_be_left_too(fake: FakeClient) -> None:
    assert len(fake.submit_detached("embed", ["", ""]).outcomes()) == 2


def test_a_closed_fake_is_closed(fake: FakeClient) -> None:
    with fake:
        fake.embed("a")

    with pytest.raises(BrokerUnavailable):
        fake.embed("a")


def test_threads_may_share_a_fake() -> None:
    fake = FakeClient(answers=upper)
    rows: list[Json] = [f"row {n}" for n in range(500)]
    wrong: list[object] = []

    def call() -> None:
        if (answer := fake.submit("s", rows).result(30)) != [str(row).upper() for row in rows]:
            wrong.append(answer)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert wrong == []
    assert len(fake.calls) == 8


def test_the_fake_for_asyncio_does_all_that_too() -> None:
    async def rows() -> AsyncIterator[Json]:
        for text in "abcde":
            yield text

    async def use() -> None:
        async with AsyncFakeClient(answers=upper) as fake:
            assert await (await fake.submit("s", ["a"])) == ["A"]
            assert await fake.call("s", "a") == "A"
            assert [row async for row in fake.map("s", rows(), window=2)] == list("ABCDE")
            detached = await fake.submit_detached("s", ["a"])
            assert fake.job(detached.id).result() == ["A"]
            fake.fail(QueueFull("full"))
            with pytest.raises(QueueFull):
                await fake.embed("a")
            with pytest.raises(InvalidRequest):
                await fake.submit("s", ["a"], timeout=-1)
            assert [call.service for call in fake.calls] == ["s"] * 8 + [SERVICE]
        assert (await AsyncFakeClient(dim=4).embed(["a", "b"])).shape == (2, 4)

    asyncio.run(use())


def test_any_function_that_wants_a_client_takes_a_fake(fake: FakeClient) -> None:
    def nearest(client: Client, query: str, texts: list[str]) -> str:
        return texts[int(np.argmax(client.embed(texts) @ client.embed(query)))]

    assert nearest(fake, "a", ["c", "a", "b"]) == "a"


def test_every_error_is_a_millstream_error(fake: FakeClient) -> None:
    fake.fail(QueueFull("full"))

    with pytest.raises(MillstreamError):
        fake.embed("a")


def test_a_service_of_another_kind_is_named_before_anything_is_sent() -> None:
    fake = FakeClient()

    with pytest.raises(InvalidRequest, match=r"'embed' is of type 'embedding' .it cannot rerank"):
        fake.rerank("q", ["a"], service="embed")
    with pytest.raises(InvalidRequest, match=r"'rerank' is of type 'reranker' .it cannot embed"):
        fake.embed("q", service="rerank")
    assert fake.calls == []


def test_a_text_is_streamed_word_by_word_and_ends_with_its_reason() -> None:
    handlers = {"chat": lambda prompts: [f"{prompts[0]} turns\nslowly"]}
    fake = FakeClient(handlers=handlers, services={"chat": "echo-stream", "echoing": "echo-stream"})

    stream = fake.stream("chat", "the mill", temperature=0.0)

    assert list(stream) == ["the ", "mill ", "turns\n", "slowly"]
    assert (stream.text, stream.finish_reason) == ("the mill turns\nslowly", "stop")
    assert list(fake.stream("echoing", "a b")) == ["a ", "b"]
    assert fake.call("chat", "a mill") == {"text": "a mill turns\nslowly", "finish_reason": "stop"}
    assert fake.job(fake.submit_detached("chat", ["a"]).id).partial() == "a turns\nslowly"
    assert [call.service for call in fake.calls] == ["chat", "echoing", "chat", "chat"]


def test_a_stream_fails_as_it_would_on_a_server() -> None:
    def broken(prompts: list[object]) -> list[object]:
        raise ValueError("no such prompt")

    fake = FakeClient(
        handlers={"chat": broken, "other": lambda prompts: [5]}, services=dict.fromkeys(LLMS, "echo-stream")
    )
    with pytest.raises(ModelFailed, match="no such prompt"):
        next(fake.stream("chat", "a"))
    with pytest.raises(ModelFailed, match="not a text"):
        next(fake.stream("other", "a"))
    fake.fail(QueueFull("full"))
    with pytest.raises(QueueFull):
        next(fake.stream("chat", "a"))
    with pytest.raises(InvalidRequest, match="does not stream"):
        fake.stream(SERVICE, "a")


def test_the_fake_for_asyncio_streams_too() -> None:
    async def use() -> None:
        async with AsyncFakeClient(services={"chat": "echo-stream"}) as fake:
            assert [piece async for piece in fake.stream("chat", "a mill")] == ["a ", "mill"]
            async with fake.stream("chat", "a mill") as stream:
                assert await anext(stream) == "a "
            assert (stream.text, stream.finish_reason) == ("a ", None)

    asyncio.run(use())


def test_stats_count_the_rows_that_were_answered() -> None:
    client = FakeClient(errors={"bad": InputTooLong("long")})
    client.embed(["a", "b"])
    with pytest.raises(PartialFailure):
        client.embed(["c", "bad"])

    stats = client.stats(SERVICE)

    assert (stats.ok, stats.failed, stats.rows) == (3, {"input_too_long": 1}, 4)
    assert client.stats("other").average_batch is None


def test_a_call_may_name_a_version_which_its_result_names(fake: FakeClient) -> None:
    assert fake.embed("a", version="v2").version == "v2"
    assert fake.embed(["a", "b"], version="v2").version == "v2"
    assert fake.rerank("a", ["b"], version="v2").version == "v2"
    assert fake.generate("a mill", version="v2").version == "v2"
    assert fake.generate("a mill", version="v2").fingerprint == FAKE_VERSION
    assert fake.embed("a").version == ""
    assert fake.calls[0].opts.version == "v2"
