"""Embedding models rank by the vectors that the library's encode_query and encode_document give, with every setting."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from embedders import save_prompted, save_routed, save_static
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.base import Prepared
from millstream.worker.models.reranking.reranker import load_reranker

CLOSE = 1e-5
QUERY = "which mill turns"
DOCUMENTS = ["a miller grinds corn.", "the stream turns", "", "水车", "the mill turns and turns and turns"]

Make = Callable[[Path, Path], Path]


def plain(tiny: Path, folder: Path, **settings: Any) -> Path:
    """The tiny model with further settings of its own."""
    model = SentenceTransformer(str(tiny), device="cpu", **settings)
    # Where a folder says nothing, the library fills in prompts that are empty.
    model.save(str(folder))
    return folder


def edited(folder: Path, file: str, **changes: object) -> Path:
    path = folder / file
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**kept, **changes}))
    return folder


def without_prompts(tiny: Path, folder: Path) -> Path:
    """Only a default prompt, which queries and documents both take."""
    made = plain(tiny, folder)
    return edited(made, "config_sentence_transformers.json", prompts={"other": "stream: "}, default_prompt_name="other")


def dense(tiny: Path, folder: Path) -> Path:
    transformer = Transformer(str(tiny))
    pooling = Pooling(transformer.get_embedding_dimension(), ("cls", "mean"))
    modules = [transformer, pooling, Dense(2 * transformer.get_embedding_dimension(), 5)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


def limits(tiny: Path, folder: Path) -> Path:
    """Queries and documents are read up to lengths of their own."""
    return edited(plain(tiny, folder), "sentence_bert_config.json", query_length=10, document_length=6)


def bare(tiny: Path, folder: Path) -> Path:
    """Texts without special tokens, cut to a few tokens."""
    kwargs = {"text": {"add_special_tokens": False, "max_length": 12}}
    return edited(plain(tiny, folder), "sentence_bert_config.json", processing_kwargs=kwargs)


SETTINGS: dict[str, Make] = {
    "truncate_dim": lambda tiny, folder: plain(tiny, folder, truncate_dim=7),
    "prompts": save_prompted,
    "prompts that are not pooled": lambda tiny, folder: save_prompted(tiny, folder, pooled=False),
    "a default prompt": without_prompts,
    "unit vectors": lambda tiny, folder: save_prompted(tiny, folder, unit=True),
    "dense": dense,
    "lengths of their own": limits,
    "settings of the tokenizer": bare,
    "dot": lambda tiny, folder: plain(tiny, folder, similarity_fn_name="dot"),
    "euclidean": lambda tiny, folder: plain(tiny, folder, similarity_fn_name="euclidean"),
    "manhattan": lambda tiny, folder: plain(tiny, folder, similarity_fn_name="manhattan", truncate_dim=9),
    "static": save_static,
    "routes": lambda tiny, folder: save_routed(tiny, save_static(tiny, folder.parent / "static"), folder),
}


def library(folder: Path, documents: Sequence[str]) -> list[float]:
    model = SentenceTransformer(str(folder), device="cpu")
    asked = model.encode_query([QUERY], show_progress_bar=False)
    given = np.concatenate([model.encode_document([text], show_progress_bar=False) for text in documents])
    return cast(list[float], model.similarity(asked, given)[0].tolist())


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_score_is_the_librarys_with_every_setting_of_a_model(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = SETTINGS[name](tiny_model, tmp_path / "model")
    # A text that makes no token has no vector, neither here nor in the library.
    documents = [text for text in DOCUMENTS if text or name != "settings of the tokenizer"]
    expected = library(folder, documents)

    spec = ModelSpec.model_validate({"type": "reranker", "model_name": str(folder)})
    model = load_reranker(spec, device="cpu", threads=1)
    rows = model.prepare(documents, {"query": QUERY, "truncate": "end"})
    assert all(isinstance(row, Prepared) for row in rows), rows
    got = cast(list[float], model.forward(cast(list[Prepared], rows)))

    assert np.std(expected) > 100 * CLOSE
    assert np.abs(np.array(got) - expected).max() < CLOSE


def test_a_setting_of_the_tokenizer_that_is_unknown_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = plain(tiny_model, tmp_path / "model")
    edited(folder, "sentence_bert_config.json", processing_kwargs={"text": {"is_split_into_words": True}})

    spec = ModelSpec.model_validate({"type": "reranker", "model_name": str(folder)})
    with pytest.raises(ModelUnavailable, match="is_split_into_words"):
        load_reranker(spec, device="cpu", threads=1)
