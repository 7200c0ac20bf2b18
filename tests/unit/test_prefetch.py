"""The next batch is made while a forward runs, and nobody can tell but by the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from rerankers import save_cross_encoder, save_judge

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.job import Json
from millstream.worker.models.base import Foresees, Model, Prepared
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.kernels.prefetch import Prefetch, runs_by_itself
from millstream.worker.models.reranking.reranker import load_reranker

CPU = torch.device("cpu")


class Maker:
    """Makes a tensor of each batch's lengths, and remembers for which rows."""

    def __init__(self) -> None:
        self.made: list[Sequence[Prepared]] = []
        self.fails = False

    def __call__(self, rows: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        if self.fails:
            raise RuntimeError("out of memory")
        self.made.append(list(rows))
        return {"lengths": torch.tensor([row.tokens for row in rows])}


def rows(*lengths: int) -> list[Prepared]:
    return [Prepared(tokens, None) for tokens in lengths]


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU ran forwards while their callers do something else."""
    monkeypatch.setattr("millstream.worker.models.kernels.prefetch.runs_by_itself", lambda device, backend: True)


@pytest.fixture
def prefetch(by_itself: None, make: Maker) -> Prefetch:
    return Prefetch(CPU, make)


def test_the_next_batch_is_made_once_a_forward_runs(prefetch: Prefetch, make: Maker) -> None:
    now, after = rows(1, 2), rows(3)
    prefetch.foresee(lambda: after)

    prefetch.batch(now)
    prefetch.make_next()
    assert make.made == [now, after]
    tensors = prefetch.batch(after)

    assert tensors["lengths"].tolist() == [3]
    assert make.made == [now, after]


def test_a_batch_that_was_not_foreseen_is_made_as_ever(prefetch: Prefetch) -> None:
    expected, like_it = rows(3), rows(3)
    prefetch.foresee(lambda: expected)
    prefetch.make_next()

    assert prefetch.batch(rows(4, 5))["lengths"].tolist() == [4, 5]
    assert prefetch.batch(expected)["lengths"].tolist() == [3]
    prefetch.make_next()
    # Rows are themselves, not what they look like.
    assert prefetch.batch([*like_it, *expected])["lengths"].tolist() == [3, 3]


def test_what_fails_to_be_made_ahead_fails_its_own_forward_alone(prefetch: Prefetch, make: Maker) -> None:
    after = rows(3)
    prefetch.foresee(lambda: after)
    make.fails = True
    prefetch.make_next()

    with pytest.raises(RuntimeError, match="out of memory"):
        prefetch.batch(after)
    make.fails = False
    assert prefetch.batch(after)["lengths"].tolist() == [3]


def test_where_nothing_waits_nothing_is_made(prefetch: Prefetch, make: Maker) -> None:
    prefetch.make_next()
    prefetch.foresee(list)
    prefetch.make_next()

    assert make.made == []


def test_a_device_that_runs_in_the_callers_time_is_asked_nothing(make: Maker) -> None:
    prefetch = Prefetch(CPU, make)
    prefetch.foresee(lambda: pytest.fail("asked"))

    prefetch.make_next()

    assert make.made == []


def prepared(model: Model, texts: Sequence[Json]) -> list[Prepared]:
    return cast(list[Prepared], model.prepare(texts, model.sample_options))


@pytest.mark.parametrize(("device", "backend", "does"), [("cuda:1", "torch", True), ("cuda", "onnx", False)])
def test_torch_on_cuda_runs_by_itself(device: str, backend: str, does: bool) -> None:
    assert runs_by_itself(torch.device(device), backend) is does


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("kind", ["embedding", "cross-encoder", "qwen3"])
def test_models_answer_the_same_ahead_of_time(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    model: Model
    if kind == "embedding":
        model = EmbeddingModel(ModelSpec(type="embedding", model_name=str(tiny_model)), "cpu", 1)
    else:
        folder = save_cross_encoder(tmp_path / "m") if kind == "cross-encoder" else save_judge(tmp_path / "m", kind)
        model = load_reranker(ModelSpec(type="reranker", model_name=str(folder)), "cpu", 1)
    first, second = prepared(model, ["a mill", "the stream turns"]), prepared(model, ["corn"])
    alone = [model.forward(first), model.forward(second)]
    upcoming = [second, []]
    assert isinstance(model, Foresees)
    model.foresee(lambda: upcoming.pop(0))

    ahead = [model.forward(first), model.forward(second)]

    assert upcoming == []
    for one, other in zip(ahead, alone, strict=True):
        assert np.array_equal(np.array(one), np.array(other))
