"""Weights, and what else makes vectors, are known by what they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.operations import RERANK
from millstream.worker.models.loading.source import locate, settings_digest, weights_digest


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "2_Dense" / "model.safetensors").write_bytes(b"two")
    (tmp_path / "config.json").write_bytes(b"{}")
    return tmp_path


def test_one_file_has_its_own_digest_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"one")
    (tmp_path / "config.json").write_bytes(b"{}")

    assert weights_digest(tmp_path) == hashlib.sha256(b"one").hexdigest()


def test_of_several_files_names_and_contents_count(shards: Path) -> None:
    before = weights_digest(shards)

    (shards / "2_Dense" / "model.safetensors").rename(shards / "2_Dense" / "other.safetensors")
    renamed = weights_digest(shards)
    (shards / "2_Dense" / "other.safetensors").write_bytes(b"three")
    rewritten = weights_digest(shards)

    assert len({before, renamed, rewritten}) == 3


def test_what_is_no_weights_file_does_not_count(shards: Path) -> None:
    before = weights_digest(shards)

    (shards / "config.json").write_bytes(b"{ }")

    assert weights_digest(shards) == before


def test_a_short_name_on_the_hub_is_of_the_organization_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")

    assert locate("ms-marco-MiniLM-L6-v2", RERANK.organization) == "cross-encoder/ms-marco-MiniLM-L6-v2"
    assert locate("mill/reranker", RERANK.organization) == "mill/reranker"
    assert locate("all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    assert locate("here", RERANK.organization) == tmp_path / "here"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="cross-encoder/ms-marco"):
        locate("ms-marco-MiniLM-L6-v2", RERANK.organization)


# -- what else makes vectors ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder as two hosts may have it, but for its weights."""
    folder = tmp_path / "model"
    files = {
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Router"}]',
        "config.json": "{}",
        "config_sentence_transformers.json": '{"prompts": {}}',
        "sentence_bert_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "vocab.txt": "a",
        "1_Pooling/config.json": '{"pooling_mode": "mean"}',
        "2_Router/router_config.json": "{}",
        "2_Router/query_0_Transformer/sentencepiece.bpe.model": "a",
        "2_Router/query_0_Transformer/config.json": "{}",
        "onnx/config.json": "{}",
        "README.md": "a",
        "data_config.json": "{}",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "modules.json",
        "config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "1_Pooling/config.json",
        "2_Router/router_config.json",
        "2_Router/query_0_Transformer/sentencepiece.bpe.model",
    ],
)
def test_the_tokenizer_the_modules_and_the_prompts_count(model: Path, name: str) -> None:
    before = settings_digest(model)

    (model / name).write_text((model / name).read_text() + " ")

    assert settings_digest(model) != before


@pytest.mark.parametrize("name", ["README.md", "data_config.json", "onnx/config.json", "vocab.txt"])
def test_what_makes_no_vector_does_not_count_and_may_be_missing(model: Path, name: str) -> None:
    before = settings_digest(model)

    (model / name).unlink()

    assert settings_digest(model) == before


def test_a_vocabulary_counts_where_it_is_what_is_read(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    before = settings_digest(model)

    (model / "vocab.txt").write_text("b")

    assert settings_digest(model) != before
