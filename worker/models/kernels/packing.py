"""Texts of any lengths in one forward of an encoder, with no padding: each sees itself alone and has its own positions.

sentence-transformers does so with flash attention's kernels on CUDA, which know the bounds of texts by the same name;
no kernel of torch does so on the CPU. Everything but attention runs over all tokens at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence as padded
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from millstream.broker.contract.errors import described
from millstream.worker.models.loading.sharing import Features

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

_SKIPS_PADDING = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
"""Architectures whose tokens meet in attention alone. And whether the id of the padding token is its position, too, and
the others are counted from there on: also where a text has that token."""

_AFTER = ("Pooling", "Normalize", "Dense", "Dropout", "LayerNorm")
"""Modules that may follow: they read a text's own token vectors, and no other feature."""

_TEXTS = ((7, 8), (9, 10, 11, 12, 13, 14, 15, 16, 17), (11,), (18, 7, 19, 20), (8, 21))
_CLOSE = {torch.float32: 1e-5}
_CLOSE_ENOUGH = 2e-2
"""The largest relative difference to a text that runs alone; of half the digits, other kernels already make as much."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' "sdpa". Where `cu_seq_lens_q` [texts + 1] tells the bounds of texts, each sees itself alone.

    query, key, value [1, heads, tokens, dim]; returns [1, tokens, heads, dim].
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    seen = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    end = 0
    for length, texts in groupby(cu_seq_lens_q.diff().tolist()):
        # Neighbours of one length are one call, and not even copied.
        count = len(list(texts))
        start, end = end, end + count * length
        q, k, v = (
            torch.unflatten(each[0, :, start:end], 1, (count, length)).transpose(0, 1) for each in (query, key, value)
        )
        found = scaled_dot_product_attention(q, k, v, scale=settings.get("scaling"))
        seen[start:end] = found.transpose(1, 2).flatten(0, 1)
    return seen[None], None


NAME = "millstream"
"""Of that function among transformers' own: "sdpa", which it is but for packed texts."""
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


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
        transformer = cast(Any, model[0]).auto_model
        try:
            alone = _alone(model)
            transformer.set_attn_implementation(NAME)
            packing = cls(model)
            if packing._gives(alone):
                return packing
            log.warning(
                "packed texts differ from single ones in this model or with this transformers: batches are padded"
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the model may run as it ever did
            log.warning("this model cannot pack texts, batches are padded: %s", described(error))
        transformer.set_attn_implementation("sdpa")
        return None

    def run(self, texts: Sequence[Features]) -> torch.Tensor:
        """The model's vectors [texts, dim], in order. Inside torch.inference_mode."""
        order = sorted(range(len(texts)), key=lambda text: len(texts[text]["input_ids"]))
        lengths = np.array([len(texts[text]["input_ids"]) for text in order])
        ends = np.cumsum(lengths)
        tokens, types = (_in_a_row([texts[text] for text in order], name, ends[-1]) for name in _INPUTS)
        # Of each token: its place in its text.
        places = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
        features = {
            "input_ids": torch.from_numpy(tokens)[None],
            "position_ids": torch.from_numpy(self._positions(tokens, places, lengths))[None],
            "token_type_ids": torch.from_numpy(types)[None],
            "cu_seq_lens_q": torch.from_numpy(np.append(0, ends)),
        }
        vectors = self._first(features)["token_embeddings"][0].split(lengths.tolist())
        # The longest first, in pieces that pad little: all at once could need far more memory than the forward did.
        pieces: list[list[torch.Tensor]] = []
        for text in reversed(vectors):
            if not pieces or len(pieces[-1][0]) * (len(pieces[-1]) + 1) > len(tokens):
                pieces.append([])
            pieces[-1].append(text)
        pooled = torch.cat([self._pooled(piece) for piece in pieces])
        return pooled[np.argsort(order[::-1])]

    def _positions(self, tokens: Ints, places: Ints, lengths: Ints) -> Ints:
        """Of each token, as the model itself counts them in a text of its own."""
        if not self._skips_padding:
            return places
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

    def _gives(self, alone: torch.Tensor) -> bool:
        """Whether a few texts get, packed, the vectors that each gets alone."""
        with torch.inference_mode():
            difference = (self.run([{"input_ids": text} for text in _TEXTS]) - alone).norm(dim=1) / alone.norm(dim=1)
        return bool((difference <= _CLOSE.get(alone.dtype, _CLOSE_ENOUGH)).all())


_INPUTS = ("input_ids", "token_type_ids")


def _in_a_row(texts: Sequence[Features], name: str, tokens: int) -> Ints:
    """That input of all texts, one after another; zeros if the tokenizer makes none."""
    if name not in texts[0]:
        return np.zeros(tokens, np.int64)
    return np.fromiter(chain.from_iterable(text[name] for text in texts), np.int64, tokens)


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


def _alone(model: SentenceTransformer) -> torch.Tensor:
    """The vectors of a few texts, each in a forward of its own."""
    ids = [torch.tensor([text]) for text in _TEXTS]
    features: list[Mapping[str, torch.Tensor]] = [{"input_ids": each, "attention_mask": each * 0 + 1} for each in ids]
    with torch.inference_mode():
        return torch.cat([cast(torch.Tensor, model(dict(each))["sentence_embedding"]) for each in features])
