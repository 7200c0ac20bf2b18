"""A call's documents come back best first; what cannot be asked is refused before anything is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError, PartialFailure
from millstream.client import Ranked, Ranking, Values
from millstream.client.rows import MAX_ROW_BYTES, measure_rows, split_rows
from millstream.client.testing import AsyncFakeClient, FakeClient, fake_score

DOCUMENTS = ["the sea", "an old mill", "old stones", "a mill"]


@pytest.fixture
def fake() -> FakeClient:
    return FakeClient()


def spec(**runtime: object) -> ServiceSpec:
    return ServiceSpec(
        name="rerank", model=ModelSpec(type="reranker", model_name="m"), model_ref="m", runtime=Runtime(**runtime)
    )


def test_the_best_come_first_and_ties_keep_the_documents_order(fake: FakeClient) -> None:
    ranking = fake.rerank("old mill", DOCUMENTS)

    assert isinstance(ranking, Ranking)
    assert ranking == [Ranked(1, 1.0), Ranked(2, 0.5), Ranked(3, 0.5), Ranked(0, 0.0)]
    assert ranking.usage == {"tokens": 17}
    assert ranking.timings["total"] >= 0
    assert ranking.truncated == ()


def test_only_the_first_are_given_with_their_documents_where_asked(fake: FakeClient) -> None:
    assert fake.rerank("old mill", DOCUMENTS, top_n=2, return_documents=True) == [
        Ranked(1, 1.0, "an old mill"),
        Ranked(2, 0.5, "old stones"),
    ]
    assert len(fake.rerank("old mill", DOCUMENTS, top_n=99)) == 4
    assert fake.rerank("old mill", []) == []


def test_an_async_client_ranks_alike(fake: FakeClient) -> None:
    async def ranked() -> Ranking:
        async with AsyncFakeClient() as client:
            return await client.rerank("old mill", DOCUMENTS, top_n=3)

    assert asyncio.run(ranked()) == fake.rerank("old mill", DOCUMENTS, top_n=3)


def test_submit_map_and_detached_calls_give_the_scores_in_the_documents_order(fake: FakeClient) -> None:
    expected = [fake_score("old mill", document) for document in DOCUMENTS]
    result = fake.submit("rerank", DOCUMENTS, query="old mill").result()

    assert result == expected
    assert isinstance(result, Values)
    assert result.usage == {"tokens": 17}
    assert list(fake.map("rerank", iter(DOCUMENTS), query="old mill", window=4)) == expected
    assert fake.submit_detached("rerank", DOCUMENTS, query="old mill").result() == expected


def test_what_a_call_asks_for_travels_as_its_options(fake: FakeClient) -> None:
    fake.rerank("q", ["a"], scores="raw", instruction="i", truncate="end", service="rerank", priority="realtime")
    fake.rerank("q", ["a"])

    assert fake.calls[0].opts.options == {"query": "q", "scores": "raw", "instruction": "i", "truncate": "end"}
    assert fake.calls[1].opts.options == {"query": "q"}


def test_a_document_that_fails_leaves_the_others_scores() -> None:
    fake = FakeClient(errors={"long": InputTooLong("600 tokens")})

    with pytest.raises(PartialFailure) as failure:
        fake.rerank("old mill", ["a mill", "long"])

    assert isinstance(failure.value.errors[1], InputTooLong)
    assert failure.value.results == [0.5, None]


@pytest.mark.parametrize(
    "call",
    [
        lambda fake: fake.rerank(None, ["a"]),
        lambda fake: fake.rerank(["q"], ["a"]),
        lambda fake: fake.rerank("\ud800", ["a"]),
        lambda fake: fake.rerank("q", "a"),
        lambda fake: fake.rerank("q", ["a"], top_n=0),
        lambda fake: fake.rerank("q", ["a"], top_n=True),
        lambda fake: fake.rerank("q", ["a"], top_n="3"),
        lambda fake: fake.rerank("q", ["a"], scores="softmax"),
        lambda fake: fake.rerank("q", ["a"], instruction=5),
        lambda fake: fake.rerank("q", ["a"], truncate="middle"),
        lambda fake: fake.rerank("q", ["a"], service="embed"),
        lambda fake: fake.embed(["a"], service="rerank"),
        lambda fake: fake.submit("rerank", ["a"]),
        lambda fake: fake.submit("rerank", ["a"], query=5),
        lambda fake: fake.submit("rerank", ["a"], query="q", top_n=3),
        lambda fake: fake.submit_detached("rerank", ["a"]),
        lambda fake: list(fake.map("rerank", ["a"])),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(
    fake: FakeClient, call: Callable[[FakeClient], Any]
) -> None:
    with pytest.raises(InvalidRequest):
        call(fake)

    assert fake.calls == []


def test_an_option_that_is_nearly_right_is_named(fake: FakeClient) -> None:
    with pytest.raises(InvalidRequest) as failure:
        fake.submit("rerank", ["a"], querry="q")

    assert "query" in str(failure.value.hint)


def test_a_query_counts_in_each_row_that_it_is_read_with() -> None:
    documents = ["x" * 40] * 64

    alone, _ = split_rows(spec(batch_size=64), documents)
    asked, _ = split_rows(spec(batch_size=64), documents, beside=400)

    assert [len(part.rows) for part in alone] == [64]
    assert {len(part.rows) for part in asked} == {2_048 // (2 + 440 // 4), 64 % (2_048 // (2 + 440 // 4))}
    assert sum(part.tokens for part in asked) == 64 * (2 + 440 // 4)


def test_a_document_that_is_too_large_with_its_query_does_not_travel(fake: FakeClient) -> None:
    sizes, refused = measure_rows(["a", "b" * 100], beside=MAX_ROW_BYTES - 50)

    assert list(sizes) == [0]
    assert isinstance(refused[1], InputTooLong)
    with pytest.raises(InputTooLong):
        fake.rerank("q" * (MAX_ROW_BYTES + 1), ["a", "b"])


def test_the_same_document_travels_once_for_a_query_where_answers_are_kept() -> None:
    parts, _ = split_rows(spec(enable_cache=True), ["a", "b", "a"], beside=10)

    assert [(part.rows, dict(part.twins)) for part in parts] == [((0, 1), {0: [2]})]


def test_other_names_can_be_rerankers_too(fake: FakeClient) -> None:
    own = FakeClient(services={"ours": "reranker"}, answers=lambda document: float(len(document)))

    assert [each.index for each in own.rerank("q", ["a", "ccc", "bb"], service="ours")] == [1, 2, 0]
    assert own.rerank("q", ["a"])[0].score == 1.0
    with pytest.raises(MillstreamError):
        fake.rerank("q", ["a"], service="ours")
