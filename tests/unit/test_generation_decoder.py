"""The decoder computes what transformers' layers compute; other layers are left to transformers."""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from generating import Job, Run, load, rows_of, tokens_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


def saved(home: Path, kind: str, **settings: Any) -> Path:
    import language_models

    folder = home / f"{kind}-{zlib.crc32(repr(settings).encode())}"
    if not folder.exists():
        language_models.save_language_model(folder, kind, **settings)
    return folder


def texts(model: Any, options: Mapping[str, Any]) -> list[list[int]]:
    rng = random.Random(4)
    rows = rows_of(model, [Job.random(rng, most=20) for _ in range(12)], {"ignore_eos": True, **options})
    outcomes = Run(model, part_tokens=30).until_done(rows, rng)
    return [tokens_of(outcomes[row.owner]) for row in rows]


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("grouped", {"tie_word_embeddings": True}),
        ("grouped", {"attention_bias": True, "mlp_bias": True}),
        ("grouped", {"rope_parameters": YARN}),
        ("mistral", {"sliding_window": None, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_texts_are_those_of_transformers_own_layers(
    home: Path, kind: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    folder = saved(home, kind, **settings)
    own, fast = load(folder, kernels="off"), load(folder)

    assert own._decoder is None
    assert fast._decoder is not None
    assert texts(fast, options) == texts(own, options)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}),
        ("grouped", {"hidden_act": "gelu"}),
        ("grouped", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
    ],
    ids=str,
)
def test_other_layers_are_left_to_transformers(home: Path, kind: str, settings: dict[str, Any]) -> None:
    assert load(saved(home, kind, **settings))._decoder is None


def test_a_linear_layer_of_another_class_is_left_to_transformers(home: Path) -> None:
    from torch import nn

    from millstream.worker.generation.decoder import Decoder

    class Quantized(nn.Linear):
        pass

    model = load(saved(home, "grouped"), kernels="off")._model
    assert Decoder.knows(model)
    model.model.layers[1].mlp.up_proj = Quantized(32, 64)
    assert not Decoder.knows(model)


def test_a_decoder_whose_logits_differ_is_not_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from millstream.worker.generation import decoder

    folder = saved(home, "grouped")
    expected = texts(load(folder, kernels="off"), {"temperature": 0.0})
    rotate = decoder._rotate
    monkeypatch.setattr(decoder, "_rotate", lambda heads, rotations: rotate(heads, 1.001 * rotations))

    with caplog.at_level(logging.WARNING):
        model = load(folder)

    assert model._decoder is None
    assert "it runs as transformers has it" in caplog.text
    # Its matrices are views of joined ones now.
    assert texts(model, {"temperature": 0.0}) == expected


@pytest.mark.parametrize("packs", [False, True], ids=["torch", "oneDNN"])
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_logits_in_lower_precision_are_close_and_weights_are_kept_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, close: float, packs: bool
) -> None:
    import torch

    from millstream.worker.generation import matrices
    from millstream.worker.generation.forward import Forward, Span

    monkeypatch.setattr(matrices, "_time_ratio", lambda *_: 0.5 if packs else 2.0)
    folder = saved(home, "qwen3", tie_word_embeddings=True)
    own, fast = load(folder, dtype=dtype, kernels="off"), load(folder, dtype=dtype)
    span = Span(list(range(10, 60)), 0, [1], True)
    logits = [Forward(each._model, each._decoder).run([span]).float() for each in (own, fast)]

    assert own.fingerprint == fast.fingerprint
    assert torch.linalg.vector_norm(logits[1] - logits[0]) <= close * torch.linalg.vector_norm(logits[0])
    layer = fast._model.model.layers[1]
    joined, _ = fast._decoder._layers[1].joined.parameters
    assert layer.self_attn.v_proj.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert (joined.numel() == 0) == packs


def test_products_of_onednn_that_change_the_logits_are_taken_back(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from millstream.worker.generation import matrices

    monkeypatch.setattr(matrices, "_time_ratio", lambda *_: 2.0)
    folder = saved(home, "grouped", attention_bias=True, mlp_bias=True)
    expected = texts(load(folder, dtype="float32"), {"temperature": 0.0})
    onednns = matrices.onednns

    def doubled(packed: torch.Tensor, bias: torch.Tensor | None) -> matrices.Product:
        product = onednns(packed, bias)
        return product._replace(of=lambda rows: 2 * product.of(rows))

    monkeypatch.setattr(matrices, "_time_ratio", lambda *_: 0.5)
    monkeypatch.setattr(matrices, "_are_equal", lambda *_: True)
    monkeypatch.setattr(matrices, "onednns", doubled)

    with caplog.at_level(logging.WARNING):
        model = load(folder, dtype="float32")

    assert "its matrices stay as torch has them" in caplog.text
    assert texts(model, {"temperature": 0.0}) == expected
