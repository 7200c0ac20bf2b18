"""Tensors that may be missing or too many, since published models are saved so, and those that may not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rerankers
import torch
from embedders import save_sparse
from models import tiny_bert
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models import Model, load

Tensors = dict[str, torch.Tensor]


def start(folder: Path, kind: str = "embedding") -> Model:
    model = ModelSpec(type=kind, model_name=str(folder))
    return load(ServiceSpec(name="mill", model=model, model_ref="m", runtime=Runtime()), "cpu", 1)


def vector(model: Model) -> NDArray[np.float32]:
    return np.asarray(model.forward(model.prepare(["the mill"], {})), dtype=np.float32)  # type: ignore[arg-type]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, alter: Callable[[Tensors], Tensors]) -> None:
    save_file(alter(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def masked(tensors: Tensors) -> Tensors:
    """As a model that was trained to fill in words is saved: with a prefix and a head, without a pooler."""
    head = {"cls.predictions.bias": torch.zeros(9), "cls.predictions.transform.dense.weight": torch.zeros(16, 16)}
    return {f"bert.{name}": tensor for name, tensor in tensors.items() if not name.startswith("pooler.")} | head


def test_an_encoder_with_the_head_of_another_task_and_no_pooler_gives_the_same_vector(folder: Path) -> None:
    whole = vector(start(folder))

    change(folder, masked)

    assert np.array_equal(vector(start(folder)), whole)


def test_the_same_with_a_layer_under_another_name_is_refused(folder: Path) -> None:
    change(
        folder, lambda tensors: {name.replace("layer.0", "layers.0"): each for name, each in masked(tensors).items()}
    )

    with pytest.raises(ModelUnavailable, match=r"lack the tensor encoder\.layer\.0\."):
        start(folder)


def test_constants_of_old_checkpoints_may_be_there(folder: Path) -> None:
    constants = {"embeddings.position_ids": torch.arange(32)[None], "embeddings.token_type_ids": torch.zeros(1, 32)}
    change(folder, lambda tensors: tensors | constants)

    assert np.isfinite(vector(start(folder))).all()


def test_a_layer_too_many_is_refused(folder: Path) -> None:
    """The settings say that there are fewer."""

    def deepened(tensors: Tensors) -> Tensors:
        return tensors | {name.replace("layer.0", "layer.1"): each + 0 for name, each in tensors.items()}

    change(folder, deepened)

    with pytest.raises(ModelUnavailable, match=r"no place for, encoder\.layer\.1\."):
        start(folder)


def test_a_pooler_that_is_read_may_not_be_missing(folder: Path) -> None:
    change(folder, lambda tensors: {name: each for name, each in tensors.items() if not name.startswith("pooler.")})
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    settings["modality_config"]["text"]["method_output_name"] = "pooler_output"
    settings["module_output_name"] = "sentence_embedding"
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    (folder / "modules.json").write_text(json.dumps(json.loads((folder / "modules.json").read_text())[:1]))

    with pytest.raises(ModelUnavailable, match=r"lack the tensor pooler\.dense"):
        start(folder)


def test_a_folder_cannot_ask_for_other_sizes_to_be_ignored(folder: Path) -> None:
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    arguments = {"model_kwargs": {"ignore_mismatched_sizes": True}}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings | arguments))
    change(folder, lambda tensors: tensors | {"embeddings.word_embeddings.weight": torch.zeros(7, 16)})

    with pytest.raises(ModelUnavailable, match=r"another shape, embeddings\.word_embeddings\.weight 7x16, not \d+x16"):
        start(folder)


def test_tied_weights_are_in_the_file_once(tmp_path: Path) -> None:
    folder = rerankers.save_judge(tmp_path / "gpt2", "gpt2")

    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert start(folder, "reranker")


def test_a_head_that_is_not_tied_may_not_be_missing(tmp_path: Path) -> None:
    folder = rerankers.save_judge(tmp_path / "qwen3", "qwen3")
    change(folder, lambda tensors: {name: each for name, each in tensors.items() if name != "lm_head.weight"})

    with pytest.raises(ModelUnavailable, match=r"lack the tensor lm_head\.weight"):
        start(folder, "reranker")


def test_a_sparse_model_needs_its_head_and_no_pooler(tiny_model: Path, tmp_path: Path) -> None:
    folder = save_sparse(tiny_model, tmp_path / "sparse")
    change(folder, lambda tensors: tensors | {"bert.pooler.dense.weight": torch.zeros(16, 16)})
    assert start(folder)

    change(folder, lambda tensors: {name: each for name, each in tensors.items() if "transform" not in name})

    with pytest.raises(ModelUnavailable, match=r"lack the tensor cls\.predictions\.transform"):
        start(folder)


def test_a_sparse_model_may_bring_the_head_that_it_was_trained_with_beside_its_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    """BERT was published with both of its heads, which are siblings: cls.predictions and cls.seq_relationship."""
    folder = save_sparse(tiny_model, tmp_path / "sparse")
    head = {"cls.seq_relationship.weight": torch.zeros(2, 16), "cls.seq_relationship.bias": torch.zeros(2)}
    change(folder, lambda tensors: tensors | head)
    assert start(folder)

    change(folder, lambda tensors: tensors | {"bert.encoder.layer.7.output.dense.bias": torch.zeros(16)})

    with pytest.raises(ModelUnavailable, match=r"no place for, bert\.encoder\.layer\.7\."):
        start(folder)


def test_a_cross_encoder_needs_its_pooler(tmp_path: Path) -> None:
    folder = rerankers.save_cross_encoder(tmp_path / "cross")
    change(folder, lambda tensors: {name: each for name, each in tensors.items() if ".pooler." not in name})

    with pytest.raises(ModelUnavailable, match=r"lack the tensor bert\.pooler"):
        start(folder, "reranker")


def test_a_plain_encoder_is_no_cross_encoder_with_a_random_head(tmp_path: Path) -> None:
    config = tiny_bert(tmp_path / "bert", num_labels=1)
    BertModel(config).save_pretrained(tmp_path / "bert")
    settings = json.loads((tmp_path / "bert" / "config.json").read_text())
    settings["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings))

    with pytest.raises(ModelUnavailable, match=r"lack the tensor classifier\."):
        start(tmp_path / "bert", "reranker")


def test_an_encoder_that_transformers_saved_for_another_task_is_an_embedding_model(tmp_path: Path) -> None:
    BertForMaskedLM(tiny_bert(tmp_path / "bert")).save_pretrained(tmp_path / "bert")

    assert np.isfinite(vector(start(tmp_path / "bert"))).all()
