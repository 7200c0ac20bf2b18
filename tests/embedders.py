"""Tiny embedding models of every kind that workers run, and what each says of one text alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from models import TINY_DIM, TINY_LIMIT
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from sentence_transformers.util.quantization import quantize_embeddings
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer

from millstream.broker.contract.job import Encoded, Json, Vectors

PROMPTS = {"query": "the miller: ", "document": "a stream: ", "other": "turns "}


def save_prompted(
    tiny: Path, folder: Path, *, pooled: bool = True, unit: bool = False, default: str | None = None
) -> Path:
    """The tiny model with prompts. Not `pooled`: its vectors leave the prompt out; `unit`: they have length one."""
    transformer = Transformer(str(tiny))
    pooling = Pooling(TINY_DIM, "mean", include_prompt=pooled)
    modules = [transformer, pooling, *([Normalize()] if unit else [])]
    model = SentenceTransformer(modules=modules, prompts=dict(PROMPTS), default_prompt_name=default, device="cpu")
    model.save(str(folder))
    return folder


def save_dense(folder: Path, tiny: Path) -> Path:
    """The tiny model with a random projection behind its pooling."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        modules = [Transformer(str(tiny)), Pooling(TINY_DIM, "mean"), Dense(TINY_DIM, 4)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


def save_static(tiny: Path, folder: Path) -> Path:
    """A bag of tokens, each with a random vector."""
    tokenizer = AutoTokenizer.from_pretrained(tiny).backend_tokenizer
    weights = torch.randn(tokenizer.get_vocab_size(), TINY_DIM, generator=torch.Generator().manual_seed(1))
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[static], prompts=dict(PROMPTS), device="cpu").save(str(folder))
    return folder


def save_routed(tiny: Path, static: Path, folder: Path) -> Path:
    """Queries go through the static model, documents through the tiny one."""
    queries, documents = SentenceTransformer(str(static), device="cpu"), SentenceTransformer(str(tiny), device="cpu")
    router = Router.for_query_document(cast(Any, list(queries.children())), cast(Any, list(documents.children())))
    SentenceTransformer(modules=[router], prompts=dict(PROMPTS), device="cpu").save(str(folder))
    return folder


def save_sparse(tiny: Path, folder: Path, max_active_dims: int | None = None) -> Path:
    """A random SPLADE model over the tiny one's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(tiny, model_max_length=TINY_LIMIT)
    config = BertConfig.from_pretrained(tiny, vocab_size=len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        BertForMaskedLM(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert"), transformer_task="fill-mask"), SpladePooling("max")]
    model = SparseEncoder(modules=modules, prompts=dict(PROMPTS), max_active_dims=max_active_dims, device="cpu")
    model.save(str(folder / "model"))
    return folder / "model"


def save_sparse_routed(tiny: Path, sparse: Path, folder: Path) -> Path:
    """Queries are looked up, each token with a weight; documents go through the sparse model."""
    documents = SparseEncoder(str(sparse), device="cpu")
    weights = torch.rand(len(documents.tokenizer), generator=torch.Generator().manual_seed(3))
    queries = SparseStaticEmbedding(BertTokenizer.from_pretrained(tiny, model_max_length=TINY_LIMIT), weight=weights)
    router = Router.for_query_document([queries], cast(Any, list(documents.children())))
    SparseEncoder(modules=[router], device="cpu").save(str(folder))
    return folder


def bits(packed: Encoded) -> Encoded:
    """The bits of vectors encoded as binary, each as a number."""
    return cast(Encoded, np.unpackbits(cast(NDArray[np.uint8], packed), axis=-1))


def alone(model: SentenceTransformer, text: str, options: Mapping[str, Json], gives_units: bool) -> Encoded:
    """What the library's own call gives for one text and these options."""
    asked = cast(dict[str, Any], dict(options))
    encoding = asked.pop("encoding", "float32")
    encode = {"query": model.encode_query, "document": model.encode_document}.get(
        asked.pop("input_type", "none"), model.encode
    )
    dimensions, normalize = asked.pop("dimensions", None), asked.pop("normalize", None)
    # Ours: what was a unit vector stays one when it is cut.
    units = bool(normalize) or (normalize is None and gives_units and dimensions is not None)
    call = {"truncate_dim": dimensions, "normalize_embeddings": units, "show_progress_bar": False, **asked}
    vector = cast(Vectors, encode([text], **call))
    if encoding == "binary":
        return cast(Encoded, quantize_embeddings(vector, "ubinary")[0])
    return cast(Encoded, vector[0].astype(np.float16 if encoding == "float16" else np.float32))
