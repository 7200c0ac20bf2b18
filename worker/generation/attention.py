"""Attention over the blocks of the KV cache, registered with transformers under the name NAME.

All new tokens of a forward are one row, [1, tokens]: the last token of each growing text, then parts of prompts. So no
layer computes padding. Attention alone looks at each request: texts that grow are one call for each group of like
length, a part of a prompt is a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "millstream_blocks"


class Growing(NamedTuple):
    """Texts of one new token each: the tokens `first` to `end` of the forward.

    `tables`: their blocks, padded, as one list [texts * blocks]. `length`: tokens of the longest. `mask` is added to
    the scores: [texts, 1, 1, length]; None if all texts are equally long.
    """

    first: int
    end: int
    tables: torch.Tensor
    length: int
    mask: torch.Tensor | None

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None) -> Any:
        texts, heads = self.end - self.first, keys.shape[2]
        # The query heads that share a key head take the place of a text's tokens: so no key is copied for each of them.
        rows = query[self.first : self.end].reshape(texts, heads, -1, query.shape[2])
        read = scaled_dot_product_attention(
            rows, self._read(keys, texts), self._read(values, texts), attn_mask=self.mask, scale=scale
        )
        return read.reshape(texts, query.shape[1], -1)

    def _read(self, storage: torch.Tensor, texts: int) -> torch.Tensor:
        """Returns keys or values as [texts, heads, length, size]."""
        blocks = storage.index_select(0, self.tables)
        return blocks.view(texts, -1, *storage.shape[2:])[:, : self.length].transpose(1, 2)


class Part(NamedTuple):
    """A part of one prompt: the tokens `first` to `end` of the forward, which end its `length` tokens so far.

    `blocks`: its blocks. `mask` is added to the scores: [tokens, length]; None if the part begins the prompt.
    """

    first: int
    end: int
    blocks: torch.Tensor
    length: int
    mask: torch.Tensor | None

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None) -> Any:
        rows = query[self.first : self.end].transpose(0, 1).unsqueeze(0)
        read = scaled_dot_product_attention(
            rows,
            self._read(keys),
            self._read(values),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=rows.shape[1] != keys.shape[2],
        )
        return read[0].transpose(0, 1)

    def _read(self, storage: torch.Tensor) -> torch.Tensor:
        """Returns keys or values as [1, heads, length, size]."""
        tokens = storage.index_select(0, self.blocks).flatten(0, 1)
        return tokens[: self.length].transpose(0, 1).unsqueeze(0)


Groups = Sequence[Growing | Part]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    groups: Groups = (),
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attends for all requests of a forward: `query` [1, heads, tokens, size]; `key` and `value` are a layer's storage.

    Returns [1, tokens, heads, size]. Raises NotImplementedError if the model asks for more than plain attention.
    """
    if others and (unknown := [name for name in _UNSUPPORTED if others.get(name) is not None]):
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    rows = query[0].transpose(0, 1)
    read = [group.attend(rows, key, value, scaling) for group in groups]
    return (read[0] if len(read) == 1 else torch.cat(read)).unsqueeze(0), None


_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window", "head_mask")
"""Arguments of other kinds of attention."""

AttentionInterface.register(NAME, attend)
