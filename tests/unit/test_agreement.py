"""Two workers of one fingerprint are told apart by their answer to a fixed text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rerankers
import torch
from embedders import save_sparse
from safetensors.torch import load_file, save_file

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.answer import Answer, allowed_distance, decode_answer, distance, encode_answer
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.measuring.agreement import answer_of
from millstream.worker.models import load

SCORES = "6448fa205c576c66+12f420f8 {} cross-encoder Identity"
FINGERPRINTS = {
    "cross-encoder": SCORES.format("float32"),
    "qwen3": "6448fa205c576c66+12f420f8 float32 generative Sigmoid",
}
FLOAT32, HALF = "6448fa205c576c66+12f420f8 float32 32", "6448fa205c576c66+12f420f8 bfloat16 32"


def answer(folder: Path, kind: str, **settings: object) -> Answer:
    model = ModelSpec.model_validate({"type": kind, "model_name": str(folder), **settings})
    agreement = model.operation.agreement
    assert agreement
    return answer_of(load(ServiceSpec(name="mill", model=model, model_ref="m", runtime=Runtime()), "cpu", 1), agreement)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    root = tmp_path_factory.mktemp("models")
    return {
        "embedding": ("embedding", tiny_model),
        "sparse": ("embedding", save_sparse(tiny_model, root / "sparse")),
        "cross-encoder": ("reranker", rerankers.save_cross_encoder(root / "cross")),
        "bi-encoder": ("reranker", rerankers.save_bi_encoder(root / "bi", tiny_model)),
        "qwen3": ("reranker", rerankers.save_judge(root / "qwen3", "qwen3")),
    }


@pytest.mark.parametrize("kind", ["embedding", "sparse", "cross-encoder", "bi-encoder", "qwen3"])
def test_one_model_agrees_with_itself_and_not_with_random_weights(
    kind: str, folders: dict[str, tuple[str, Path]], tmp_path: Path
) -> None:
    group, folder = folders[kind]
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(other / "model.safetensors")
    drawn = torch.Generator().manual_seed(5)
    # Of the spread that each tensor has, as a library would draw it anew.
    remade = {
        name: torch.randn(each.shape, generator=drawn) * each.std() if each.dim() > 1 else each
        for name, each in tensors.items()
    }
    save_file(remade, other / "model.safetensors", {"format": "pt"})

    first = decode_answer(encode_answer(answer(folder, group)))

    fingerprint = FINGERPRINTS.get(kind, FLOAT32)
    assert distance(first, answer(folder, group), fingerprint) < 1e-3
    assert distance(first, answer(other, group), fingerprint) > allowed_distance(fingerprint)


def test_half_the_digits_agree_with_each_other(tiny_model: Path) -> None:
    """bfloat16 on two devices is as far apart as it is from float32, at most."""
    assert distance(
        answer(tiny_model, "embedding"), answer(tiny_model, "embedding", dtype="bfloat16"), HALF
    ) < allowed_distance(HALF)


@pytest.mark.parametrize(("noise", "agrees"), [(1e-4, True), (1e-3, True), (0.1, False)])
def test_kernels_may_differ_by_a_thousandth(noise: float, agrees: bool) -> None:
    numbers = np.random.default_rng(6).normal(size=384)
    drift = np.random.default_rng(7).normal(size=384) * noise
    first, other = (dict(enumerate(each.tolist())) for each in (numbers, numbers + drift))

    assert (distance(first, other, FLOAT32) <= allowed_distance(FLOAT32)) is agrees


def test_scores_near_zero_may_differ_by_a_little() -> None:
    assert distance({0: 1e-4, 1: -2e-4}, {0: -1e-4, 1: 1e-4}, FLOAT32) < allowed_distance(FLOAT32)


@pytest.mark.parametrize(
    ("dtype", "apart", "agrees"),
    [("bfloat16", 0.25, True), ("bfloat16", 1.5, False), ("float32", 0.004, True), ("float32", 0.1, False)],
)
def test_logits_near_zero_may_differ_by_a_few_steps_of_their_dtype(dtype: str, apart: float, agrees: bool) -> None:
    fingerprint = SCORES.format(dtype)
    first, other = {0: 0.25, 1: -0.125, 2: 0.0}, {0: 0.25 - apart, 1: -0.125, 2: apart / 2}

    assert (distance(first, other, fingerprint) <= allowed_distance(fingerprint)) is agrees


def test_a_long_answer_is_written_as_64_numbers_spread_over_it() -> None:
    chance = np.random.default_rng(7)
    numbers = chance.normal(size=4096) / 64
    whole = dict(enumerate(numbers.tolist()))
    sparse = {place * 7: number for place, number in whole.items()}

    for answered in (whole, sparse):
        text = encode_answer(answered)
        first = decode_answer(text)

        assert len(text) < 1_200
        assert len(first) == 64
        assert min(first) < max(answered) * 0.02
        assert max(first) > max(answered) * 0.98
        assert distance(first, answered, FLOAT32) < 1e-3
        assert distance(first, {place: -number for place, number in answered.items()}, FLOAT32) > 1


def test_an_answer_without_numbers_agrees_with_its_like_alone() -> None:
    assert distance(decode_answer(encode_answer({})), {}, FLOAT32) == 0
    assert distance(decode_answer("no answer"), {0: 1.0}, FLOAT32) > 1


def test_a_model_that_answers_nan_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ModelUnavailable, match="NaN or infinity"):
        answer(folder, "embedding")
