"""Runs texts of any lengths in one forward of an encoder, without padding, as one sequence.

Attention runs for each text alone, and each text has its own positions; all other layers run over all tokens at once.
On CUDA sentence-transformers does the same with the kernels of flash attention, which take the bounds of texts by the
same name, `cu_seq_lens_q`. torch has no such kernel for the CPU.
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
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from millstream.broker.contract.errors import described
from millstream.worker.models.loading.sharing import Features

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

_SKIPS_PADDING = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
"""Model types in which only attention combines tokens. The value says how positions are counted.

False: from 0. True: from the id of the padding token, which is also the position of each padding token in a text.
"""

_AFTER = ("Pooling", "Normalize", "Dense", "Dropout", "LayerNorm")
"""Modules that may follow the transformer: they read the token vectors of one text, and no other feature."""

_TEXTS = ((7, 8), (9, 10, 11, 12, 13, 14, 15, 16, 17), (11,), (18, 7, 19, 20), (8, 21))
_CLOSE = {torch.float32: 1e-5}
_CLOSE_ENOUGH = 2e-2
"""Largest relative difference between packed texts and single ones: by dtype, and for all others.

In half precision a different kernel alone makes differences of this size.
"""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Computes transformers' "sdpa" attention; for each text alone if `cu_seq_lens_q` [texts + 1] gives their bounds.

    query, key, value [1, heads, tokens, dim]; returns [1, tokens, heads, dim].
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    seen = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    end = 0
    for length, texts in groupby(cu_seq_lens_q.diff().tolist()):
        # Texts of one length that follow each other are one call, without a copy.
        count = len(list(texts))
        start, end = end, end + count * length
        q, k, v = (
            torch.unflatten(each[0, :, start:end], 1, (count, length)).transpose(0, 1) for each in (query, key, value)
        )
        found = scaled_dot_product_attention(q, k, v, scale=settings.get("scaling"))
        seen[start:end] = found.transpose(1, 2).flatten(0, 1)
    return seen[None], None


NAME = "millstream"
"""Name under which transformers knows `attend`. It is "sdpa" for all texts that are not packed."""
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
        """Returns the packing of `model`; None if it cannot pack, or if packed test texts get other vectors."""
        if not isinstance(model, SentenceTransformer) or not _may_pack(model):
            return None
        transformer = cast(Any, model[0]).auto_model
        try:
            alone = _run_alone(model)
            transformer.set_attn_implementation(NAME)
            packing = cls(model)
            if packing._matches(alone):
                return packing
            log.warning(
                "packed texts get other vectors than single ones with this model or transformers: batches are padded"
            )
        except Exception as error:  # noqa: BLE001 - after any failure the model runs with padding
            log.warning("this model cannot pack texts, batches are padded: %s", described(error))
        transformer.set_attn_implementation("sdpa")
        return None

    def run(self, texts: Sequence[Features]) -> torch.Tensor:
        """Returns the model's vectors [texts, dim], in order. Call it inside torch.inference_mode."""
        order = sorted(range(len(texts)), key=lambda text: len(texts[text]["input_ids"]))
        lengths = np.array([len(texts[text]["input_ids"]) for text in order])
        ends = np.cumsum(lengths)
        tokens, types = (_concatenate([texts[text] for text in order], name, ends[-1]) for name in _INPUTS)
        # The place of each token in its text.
        places = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
        features = {
            "input_ids": torch.from_numpy(tokens)[None],
            "position_ids": torch.from_numpy(self._positions(tokens, places, lengths))[None],
            "token_type_ids": torch.from_numpy(types)[None],
            "cu_seq_lens_q": torch.from_numpy(np.append(0, ends)),
        }
        vectors = self._first(features)["token_embeddings"][0].split(lengths.tolist())
        # The longest text first, in groups with little padding: one group could need far more memory than the forward.
        pieces: list[list[torch.Tensor]] = []
        for text in reversed(vectors):
            if not pieces or len(pieces[-1][0]) * (len(pieces[-1]) + 1) > len(tokens):
                pieces.append([])
            pieces[-1].append(text)
        pooled = torch.cat([self._pool(piece) for piece in pieces])
        return pooled[np.argsort(order[::-1])]

    def _positions(self, tokens: Ints, places: Ints, lengths: Ints) -> Ints:
        """Returns the position of each token, counted as the model counts them in a text that runs alone."""
        if not self._skips_padding:
            return places
        counts = tokens != self._padding
        before = np.cumsum(counts)
        firsts = np.cumsum(lengths) - lengths
        of_earlier = np.repeat(np.append(0, before)[firsts], lengths)
        return np.where(counts, before - of_earlier, 0) + self._padding

    def _pool(self, texts: list[torch.Tensor]) -> torch.Tensor:
        """Runs the modules after the first, which take padded token vectors. Returns [texts, dim]."""
        ones = [torch.ones(len(text), dtype=torch.long) for text in texts]
        features = {
            "token_embeddings": pad_sequence(texts, batch_first=True),
            "attention_mask": pad_sequence(ones, batch_first=True),
        }
        for module in self._rest:
            features = module(features)
        return features["sentence_embedding"]

    def _matches(self, alone: torch.Tensor) -> bool:
        """Returns whether the packed test texts get the vectors that each gets alone."""
        with torch.inference_mode():
            difference = (self.run([{"input_ids": text} for text in _TEXTS]) - alone).norm(dim=1) / alone.norm(dim=1)
        return bool((difference <= _CLOSE.get(alone.dtype, _CLOSE_ENOUGH)).all())


_INPUTS = ("input_ids", "token_type_ids")


def _concatenate(texts: Sequence[Features], name: str, tokens: int) -> Ints:
    """Returns the input `name` of all texts, one after another; zeros if the tokenizer makes no such input."""
    if name not in texts[0]:
        return np.zeros(tokens, np.int64)
    return np.fromiter(chain.from_iterable(text[name] for text in texts), np.int64, tokens)


def _may_pack(model: SentenceTransformer) -> bool:
    first, *rest = model
    transformer = getattr(first, "auto_model", None)
    config = getattr(transformer, "config", None)
    return (
        # Not measured on CUDA yet.
        model.device.type == "cpu"
        and type(first).__name__ == "Transformer"
        # Pooling in `run` cannot leave out the tokens of a prompt.
        and all(getattr(module, "include_prompt", True) for module in rest)
        and {type(module).__name__ for module in rest}.issubset(_AFTER)
        and getattr(config, "model_type", None) in _SKIPS_PADDING
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(config, "vocab_size", 0) > max(chain.from_iterable(_TEXTS))
    )


def _run_alone(model: SentenceTransformer) -> torch.Tensor:
    """Returns the vectors of the test texts, each text in its own forward."""
    ids = [torch.tensor([text]) for text in _TEXTS]
    features: list[Mapping[str, torch.Tensor]] = [{"input_ids": each, "attention_mask": each * 0 + 1} for each in ids]
    with torch.inference_mode():
        return torch.cat([cast(torch.Tensor, model(dict(each))["sentence_embedding"]) for each in features])
