"""Documents ranked through the queue are ranked as the models themselves rank them, by real workers of both kinds."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from support import eventually

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec, load
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, PartialFailure
from millstream.broker.queue.inspector import Inspector, WorkerView
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client, Ranking
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

pytestmark = [pytest.mark.early, pytest.mark.timeout(300)]

WORKERS = 2 if os.environ.get("MILLSTREAM_LONG") else 1
"""Each takes seconds to import its libraries."""

CLOSE = 1e-5
LIMIT = 32
QUERY = "which mill?"
WORDS = ("mill", "stream", "turns", "corn", "miller", "grinds", "the", "a")


@dataclass(frozen=True)
class Stack:
    url: str
    client: Client
    inspector: Inspector
    registry: Registry
    spec: ServiceSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import rerankers

    return rerankers.save_cross_encoder(tmp_path_factory.mktemp("reranker") / "model")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model."""
    import rerankers

    return rerankers.save_judge(tmp_path_factory.mktemp("judge") / "judge", "qwen3")


def judging(folder: Path, home: Path) -> ServiceSpec:
    """The service of the language model, as a file has it."""
    (home / "config.yaml").write_text(
        f"models: {{judge: {{type: reranker, model_name: {folder}, kind: query_likelihood, device: cpu}}}}\n"
        "services: {judges: {model: judge, runtime: {worker_count: 1, total_timeout: 120}}}\n",
        encoding="utf-8",
    )
    return load(home / "config.yaml").services["judges"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model: Path, judge: Path) -> Iterator[Stack]:
    """Both services in the same worker processes."""
    beside = judging(judge, tmp_path_factory.mktemp("file"))
    spec = ServiceSpec(
        name="ranks",
        model=ModelSpec(type="reranker", model_name=str(model), device="cpu"),
        model_ref="tiny",
        runtime=Runtime(batch_size=32, worker_count=WORKERS, total_timeout=120),
    )
    with EmbeddedServer.start(tmp_path_factory.mktemp("data")) as server:
        connection = Connection(server.url)
        registry = Registry(connection)
        registry.push([spec, beside])
        supervisor = Supervisor(server.url, "ms", [Plan(spec, WORKERS, beside=[beside])])
        thread = Thread(target=supervisor.run)
        thread.start()
        try:
            eventually(lambda: supervisor.ready == WORKERS, within_s=120)
            with Client(server.url) as client:
                yield Stack(server.url, client, Inspector(connection), registry, spec)
        finally:
            supervisor.stop()
            thread.join()
            connection.close()


def test_a_language_model_of_a_file_ranks_by_the_likelihood_of_the_query(stack: Stack, judge: Path) -> None:
    texts = documents(100)

    ranking = stack.client.rerank(QUERY, texts, service="judges")
    with pytest.raises(InvalidRequest, match="log-probabilities"):
        stack.client.rerank(QUERY, texts, service="judges", scores="sigmoid")

    expected = likelihoods(judge, QUERY, texts)
    best_first = sorted(range(len(texts)), key=lambda at: -expected[at])
    assert_ranked(ranking, [(at, expected[at]) for at in best_first])


def likelihoods(folder: Path, query: str, texts: Sequence[str]) -> list[float]:
    """The mean log-probability of the query's tokens after each text, one text at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for text in texts:
        prompt = f"Passage: {text}\nQuestion answered by this passage:"
        given, ids = (tokenizer(each, return_tensors="pt").input_ids for each in (prompt, f"{prompt} {query}"))
        with torch.inference_mode():
            logits = model(ids).logits.log_softmax(-1)
        of_each = logits[0, :-1].gather(1, ids[0, 1:, None])
        found.append(float(of_each[given.shape[1] - 1 :].mean()))
    return found


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(model), device="cpu")


def documents(count: int, seed: int = 1) -> list[str]:
    """No two alike, of two to 17 words."""
    chance = random.Random(seed)
    return [f"{number} {' '.join(chance.choices(WORDS, k=chance.randint(1, 16)))}" for number in range(count)]


def ranked_by(reference: Any, query: str, texts: Sequence[str]) -> list[tuple[int, float]]:
    ranks = reference.rank(query, list(texts), show_progress_bar=False)
    return [(each["corpus_id"], each["score"]) for each in ranks]


def assert_ranked(ranking: Ranking, expected: Sequence[tuple[int, float]]) -> None:
    """The same scores, and the same order but where scores are as good as equal."""
    scores = dict(expected)
    assert len(ranking) == len(expected)
    assert max(abs(each.score - scores[each.index]) for each in ranking) < CLOSE
    of_theirs = np.array([score for _, score in expected])
    in_order = np.array([scores[each.index] for each in ranking])
    # Where the order differs, the documents that changed places score alike.
    assert np.abs(in_order - of_theirs).max() < CLOSE


def rows_of(inspector: Inspector) -> dict[str, int]:
    """Rows that each worker ran, as of a beat from now on."""
    asked_at = time.monotonic()

    def workers() -> Sequence[WorkerView]:
        return inspector.services(["ranks"])[0].workers

    eventually(lambda: all(each.beat_age_ms < (time.monotonic() - asked_at) * 1000 for each in workers()))
    return {each.consumer: each.rows for each in workers()}


def test_three_thousand_documents_are_ranked_as_the_model_ranks_them_by_all_workers(
    stack: Stack, reference: Any
) -> None:
    texts = documents(3_000)
    expected = ranked_by(reference, QUERY, texts)
    before = rows_of(stack.inspector)

    ranking = stack.client.rerank(QUERY, texts, service="ranks")

    assert_ranked(ranking, expected)
    assert np.std([score for _, score in expected]) > 1_000 * CLOSE
    assert ranking.usage["tokens"] > 3_000 * 5
    assert ranking.timings["total"] >= ranking.timings["inference"] > 0
    ran = [rows - before[worker] for worker, rows in rows_of(stack.inspector).items()]
    assert sum(ran) == 3_000
    assert min(ran) > 0


def test_only_the_best_are_given_with_their_documents_where_asked(stack: Stack, reference: Any) -> None:
    texts = documents(50, seed=2)
    expected = ranked_by(reference, QUERY, texts)[:5]

    ranking = stack.client.rerank(QUERY, texts, service="ranks", top_n=5, return_documents=True)

    assert [each.index for each in ranking] == [index for index, _ in expected]
    assert [each.document for each in ranking] == [texts[index] for index, _ in expected]


def test_two_callers_at_once_get_on_together_and_each_gets_its_own(stack: Stack, reference: Any) -> None:
    texts = documents(3_000, seed=3)
    handles = [stack.client.submit("ranks", texts, query=query) for query in (QUERY, "the corn")]

    eventually(lambda: any(handle.ready for handle in handles), within_s=60)
    least = min(handle.rows_done for handle in handles)
    results = [np.array(handle.result(60)) for handle in handles]

    assert least > 0
    for query, result in zip((QUERY, "the corn"), results, strict=True):
        expected = reference.predict([(query, text) for text in texts], show_progress_bar=False)
        assert np.abs(result - expected).max() < CLOSE


def test_scores_come_raw_mapped_and_to_an_async_client(stack: Stack, reference: Any) -> None:
    import torch

    texts = documents(40, seed=4)
    raw = reference.predict(
        [(QUERY, text) for text in texts], activation_fn=torch.nn.Identity(), show_progress_bar=False
    )

    async def ranked() -> Ranking:
        async with AsyncClient(stack.url) as client:
            return await client.rerank(QUERY, texts, service="ranks", scores="raw")

    ranking = asyncio.run(ranked())
    mapped = list(stack.client.map("ranks", iter(texts), query=QUERY, scores="raw", window=16))

    assert np.abs(np.array(mapped) - raw).max() < CLOSE
    assert {each.index: each.score for each in ranking} == pytest.approx(dict(enumerate(raw)), abs=CLOSE)


def test_a_document_that_is_too_long_is_an_error_by_index_or_cut_where_asked(stack: Stack) -> None:
    texts = ["corn", "mill " * LIMIT, "stream"]

    with pytest.raises(PartialFailure) as failure:
        stack.client.rerank(QUERY, texts, service="ranks")
    ranking = stack.client.rerank(QUERY, texts, service="ranks", truncate="end")

    assert {row: type(error) for row, error in failure.value.errors.items()} == {1: InputTooLong}
    assert [type(result) for result in failure.value.results] == [float, type(None), float]
    assert ranking.truncated == (1,)
    assert len(ranking) == 3


def test_a_query_that_is_too_long_is_the_calls_own_error(stack: Stack) -> None:
    with pytest.raises(InputTooLong, match="query"):
        stack.client.rerank("mill " * LIMIT, ["corn", "stream"], service="ranks", truncate="end")


def test_what_the_model_does_not_do_is_refused(stack: Stack) -> None:
    with pytest.raises(InvalidRequest, match="instruction"):
        stack.client.rerank(QUERY, ["corn"], service="ranks", instruction="find the mill")
    with pytest.raises(InvalidRequest):
        stack.client.embed(["corn"], service="ranks")


def test_kept_scores_are_found_again_for_the_same_query_and_no_other(stack: Stack, reference: Any) -> None:
    texts = [*documents(20, seed=5), "corn", "corn"]
    keeping = stack.spec.model_copy(update={"runtime": stack.spec.runtime.model_copy(update={"enable_cache": True})})
    stack.registry.push([keeping], replace=True)

    def ran(query: str, **options: Any) -> int:
        return stack.client.rerank(query, texts, service="ranks", **options).usage["tokens"]

    try:
        # Client and workers learn of it within a second or so.
        eventually(lambda: ran(QUERY) == 0)
        ranking = stack.client.rerank(QUERY, texts, service="ranks")

        assert_ranked(ranking, ranked_by(reference, QUERY, texts))
        assert ran("which corn?") > 0
        assert ran(QUERY, scores="raw") > 0
        assert_ranked(
            stack.client.rerank("which corn?", texts, service="ranks"), ranked_by(reference, "which corn?", texts)
        )
    finally:
        stack.registry.push([stack.spec], replace=True)
