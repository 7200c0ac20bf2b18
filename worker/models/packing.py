"""Several texts in one sequence of an encoder: each sees itself alone and counts its positions from its own start."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.nn.utils.rnn import pad_sequence as padded

from millstream.broker.errors import described
from millstream.worker.layout import Layout
from millstream.worker.models.tokens import Ids

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

_SKIPS_PADDING = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
"""Architectures whose tokens meet in attention alone. And whether the id of the padding token is its position, too, and
the others are counted from there on: also where a text has that token."""

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
        self._skips_padding = _SKIPS_PADDING[config.model_type]

    @classmethod
    def of(cls, model: object) -> Packing | None:
        """None where the model cannot pack, or does not give a few texts what it gives each alone."""
        if not isinstance(model, SentenceTransformer) or not _may_pack(model):
            return None
        try:
            packing = cls(model)
            if packing._is_exact(model):
                return packing
            log.warning("packed texts differ from single ones in this model: batches are padded")
        except Exception as error:  # noqa: BLE001 - whatever it is, the model may run as it ever did
            log.warning("this model cannot pack texts, batches are padded: %s", described(error))
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
        tokens = np.fromiter(chain.from_iterable(texts), np.int64, len(text))
        ids = _laid(tokens, packed, shape, self._padding)
        positions = _laid(self._positions(tokens, place, lengths), packed, shape, 0)
        # Empty places see one another: a token that saw nothing would be NaN.
        owners = _laid(text, packed, shape, -1)
        sees = (owners[:, :, None] == owners[:, None, :])[:, None]
        features = {"input_ids": ids, "position_ids": positions, "attention_mask": sees}
        vectors = self._first(features)["token_embeddings"].flatten(0, 1)[packed].split(lengths.tolist())
        # The longest first, in pieces that pad little: all at once could need far more memory than the forward did.
        order = np.argsort(-lengths, kind="stable").tolist()
        pieces: list[list[int]] = []
        for row in order:
            if not pieces or len(vectors[pieces[-1][0]]) * (len(pieces[-1]) + 1) > layout.tokens:
                pieces.append([])
            pieces[-1].append(row)
        pooled = torch.cat([self._pooled([vectors[row] for row in piece]) for piece in pieces])
        return pooled[np.argsort(order)]

    def _positions(self, tokens: Ints, place: Ints, lengths: Ints) -> Ints:
        """Of each token, as the model itself counts them in a text of its own."""
        if not self._skips_padding:
            return place
        counts = tokens != self._padding
        before = np.cumsum(counts)
        firsts = np.cumsum(lengths) - lengths
        of_earlier = np.repeat(np.append(0, before)[firsts], lengths)
        return np.where(counts, before - of_earlier, 0) + self._padding

    def _pooled(self, texts: list[torch.Tensor]) -> torch.Tensor:
        """What the modules after the first make of each text's token vectors, which they expect padded."""
        ones = [torch.ones(len(text), dtype=torch.long) for text in texts]
        features = {
            "token_embeddings": padded(texts, batch_first=True),
            "attention_mask": padded(ones, batch_first=True),
        }
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
        and getattr(config, "model_type", None) in _SKIPS_PADDING
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(config, "vocab_size", 0) > max(chain.from_iterable(_TEXTS))
    )


def _alone(model: SentenceTransformer, text: Ids) -> torch.Tensor:
    ids = torch.tensor([text])
    features: Mapping[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return cast(torch.Tensor, model(dict(features))["sentence_embedding"])


def _laid(values: Ints, places: torch.Tensor, shape: tuple[int, int], empty: int) -> torch.Tensor:
    """`values` at their `places` of a tensor of `shape`, and `empty` everywhere else."""
    laid = torch.full((shape[0] * shape[1],), empty, dtype=torch.long)
    laid[places] = torch.from_numpy(values)
    return laid.view(shape)
