"""Several texts in one sequence of an encoder: each sees itself alone and counts its positions from its own start."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from millstream.worker.layout import Layout
from millstream.worker.models.tokens import Ids

log = logging.getLogger(__name__)

_FIRST_POSITION = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
"""Architectures whose tokens meet in attention alone; and whether positions begin after that of the padding token."""

_AFTER = ("Pooling", "Normalize", "Dense", "Dropout", "LayerNorm")
"""Modules that may follow: they read a text's own token vectors, and no other feature."""

_TEXTS = ((7, 8), (9, 10, 11, 12, 13, 14, 15, 16, 17), (11,), (18, 7, 19, 20))
_CLOSE = {torch.float32: 1e-5}
_CLOSE_ENOUGH = 2e-2
"""The largest relative difference to a text that runs alone; of half the digits, other kernels already make as much."""


class Packing:
    """The forward of a dense sentence-transformers model over packed texts."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._first, *self._rest = model
        config = cast(Any, self._first).auto_model.config
        self._padding = int(config.pad_token_id or 0)
        self._first_position = self._padding + 1 if _FIRST_POSITION[config.model_type] else 0

    @classmethod
    def of(cls, model: object) -> Packing | None:
        """None where the model cannot pack, or does not give a few texts what it gives each alone."""
        if not isinstance(model, SentenceTransformer) or not _may_pack(model):
            return None
        packing = cls(model)
        if packing._is_exact(model):
            return packing
        log.warning("packed texts differ from single ones in this model: batches are padded")
        return None

    def run(self, texts: Sequence[Ids], layout: Layout) -> torch.Tensor:
        """The model's vectors [texts, dim], in order. Inside torch.inference_mode."""
        lengths = np.array([len(text) for text in texts])
        starts = np.zeros(len(texts), dtype=np.int64)
        for sequence, rows in enumerate(layout.sequences):
            starts[rows] = sequence * layout.width + np.cumsum([0, *lengths[rows][:-1]])
        # Of each token: its text, its place there, and its place in the packed batch.
        text = np.repeat(np.arange(len(texts)), lengths)
        place = np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        packed = torch.from_numpy(starts[text] + place)
        shape = len(layout.sequences), layout.width
        ids = _laid(list(chain.from_iterable(texts)), packed, shape, self._padding)
        positions = _laid(place + self._first_position, packed, shape, self._first_position)
        # Empty places see one another: a token that saw nothing would be NaN.
        owners = _laid(text, packed, shape, -1)
        sees = (owners[:, :, None] == owners[:, None, :])[:, None]
        features = {"input_ids": ids, "position_ids": positions, "attention_mask": sees}
        tokens = self._first(features)["token_embeddings"].flatten(0, 1)[packed]
        return self._pooled(tokens, torch.from_numpy(text), torch.from_numpy(place), lengths)

    def _pooled(self, tokens: torch.Tensor, text: torch.Tensor, place: torch.Tensor, lengths: Any) -> torch.Tensor:
        """What the modules after the first make of each text's token vectors, which they expect padded."""
        vectors = tokens.new_zeros(len(lengths), int(lengths.max()), tokens.shape[1])
        vectors[text, place] = tokens
        mask = torch.zeros(vectors.shape[:2], dtype=torch.long)
        mask[text, place] = 1
        features = {"token_embeddings": vectors, "attention_mask": mask}
        for module in self._rest:
            features = module(features)
        return features["sentence_embedding"]

    def _is_exact(self, model: SentenceTransformer) -> bool:
        """Whether a few texts get, packed, the vectors that each gets alone."""
        texts = [list(text) for text in _TEXTS]
        width = sum(map(len, texts[:2]))
        with torch.inference_mode():
            alone = torch.cat([_alone(model, text) for text in texts])
            together = self.run(texts, Layout([[0, 1], [3, 2]], width))
        difference = (together - alone).norm(dim=1) / alone.norm(dim=1)
        return bool((difference <= _CLOSE.get(alone.dtype, _CLOSE_ENOUGH)).all())


def _may_pack(model: SentenceTransformer) -> bool:
    first, *rest = model
    transformer = getattr(first, "auto_model", None)
    config = getattr(transformer, "config", None)
    return (
        # On CUDA nobody has measured it yet.
        model.device.type == "cpu"
        and type(first).__name__ == "Transformer"
        and {type(module).__name__ for module in rest}.issubset(_AFTER)
        and getattr(config, "model_type", None) in _FIRST_POSITION
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(config, "vocab_size", 0) > max(chain.from_iterable(_TEXTS))
    )


def _alone(model: SentenceTransformer, text: Ids) -> torch.Tensor:
    ids = torch.tensor([text])
    features: Mapping[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return cast(torch.Tensor, model(dict(features))["sentence_embedding"])


def _laid(values: Any, places: torch.Tensor, shape: tuple[int, int], empty: int) -> torch.Tensor:
    """`values` at their `places` of a tensor of `shape`, and `empty` everywhere else."""
    laid = torch.full((shape[0] * shape[1],), empty, dtype=torch.long)
    laid[places] = torch.as_tensor(values, dtype=torch.long)
    return laid.view(shape)
