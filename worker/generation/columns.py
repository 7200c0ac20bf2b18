"""A copy of the keys and values of texts that grow, side by side: so a step need not gather them from their blocks.

Each text has a row, and the last tokens of all texts are in one column. Attention does not depend on the order of keys,
whose positions are in themselves, so a step writes one column, and masks what is left of the shorter texts. A text that
joins gets a row, one that leaves gives its row to the last one; the others stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from millstream.worker.generation.blocks import BLOCK, NULL, blocks_for
from millstream.worker.generation.kv_cache import BlockCache

MOST_BYTES = 128 * 2**20
"""Bytes of a copy at most."""

LEAST_ROWS = 16
"""Rows of a copy at least. Those that are not used take no memory."""

SPARSE = 2
"""A copy has at most this many columns for each token of its texts, or `DENSE` columns in all."""

DENSE = 4_096


class Single(Protocol):
    """A text and its new token: `first` tokens, in `blocks`, come before it. `text` names it, None if nothing does."""

    @property
    def text(self) -> int | None: ...

    @property
    def first(self) -> int: ...

    @property
    def blocks(self) -> Sequence[int]: ...


class LayerColumns(NamedTuple):
    """One layer's part of a step. `new` takes the new keys and values: [texts, 2, heads, size].

    `keys`: [texts * heads, size, length], `values`: [texts * heads, length, size], the new token last.
    """

    new: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Together(NamedTuple):
    """The texts of a copy in one step: the first `texts` tokens of the forward. `mask`: [texts * heads, 1, length]."""

    texts: int
    mask: torch.Tensor
    layers: Sequence[LayerColumns]

    def attend(self, layer: LayerColumns, heads: torch.Tensor, scale: float) -> torch.Tensor:
        """Returns what the queries read, [texts, queries, size]. `heads`: [texts, queries + keys + values, size]."""
        new, keys, values = layer
        texts, size = self.texts, heads.shape[2]
        written = 2 * new.shape[2]
        new.copy_(heads[:, -written:].view(new.shape))
        # The query heads that share a key head are the rows of one product.
        rows = heads[:, :-written].reshape(len(keys), -1, size)
        scores = torch.baddbmm(self.mask, rows, keys, alpha=scale)
        return torch.bmm(scores.softmax(-1), values).view(texts, -1, size)


class Columns:
    """The copy of one cache's layers. It follows the texts of each forward: `follow`, then `advance` if that succeeded.

    The columns up to `_end` are written, in `_lengths[row]` of them each row has its tokens; the others are masked, and
    finite.
    """

    def __init__(self, cache: BlockCache) -> None:
        self._cache = cache
        self.clear()

    def clear(self) -> None:
        """Forgets all texts, and frees the memory."""
        self._names: list[int] = []
        self._lengths: list[int] = []
        self._end = self._width = self._rows = 0
        # All of them are views of the memory, or of the mask.
        self._memory = self._stored = self._new = self._keys = self._values = torch.empty(0)
        self._mask = self._masks = torch.empty(0)

    def follow(self, spans: Sequence[Single]) -> list[int] | None:
        """Makes rows for the texts of `spans`. Returns the spans' places in order of rows; None if no copy is made."""
        place = {span.text: at for at, span in enumerate(spans)}
        order = [place.get(name, -1) for name in self._names]
        if (
            len(order) == len(spans)
            and -1 not in order
            and self._end < self._width
            and [spans[at].first for at in order] == self._lengths
        ):
            return order
        if not self._fits(spans):
            return None
        for row in range(len(order) - 1, -1, -1):
            if order[row] < 0 or spans[order[row]].first != self._lengths[row]:
                self._remove(row)
        known = set(self._names)
        joining = [span for span in spans if span.text not in known]
        longest = max(span.first for span in spans)
        if self._end == self._width or longest > self._end or len(spans) > self._rows:
            self._begin(len(spans), longest)
            joining = list(spans)
        if joining:
            self._join(joining)
        self._cut()
        return [place[name] for name in self._names]

    def _fits(self, spans: Sequence[Single]) -> bool:
        """Whether a copy is neither too large nor mostly empty."""
        if not spans or self._cache.token_bytes == 0 or any(span.text is None for span in spans):
            return False
        columns = len(spans) * (max(span.first for span in spans) + 1)
        if columns > max(DENSE, SPARSE * sum(span.first + 1 for span in spans)):
            return False
        return columns * self._cache.token_bytes <= MOST_BYTES

    def _remove(self, row: int) -> None:
        last, end = len(self._names) - 1, self._end
        name, length = self._names.pop(), self._lengths.pop()
        if row < last:
            self._names[row], self._lengths[row] = name, length
            self._stored[:, :, row, ..., :end] = self._stored[:, :, last, ..., :end]
            self._mask[row] = self._mask[last]

    def _begin(self, texts: int, longest: int) -> None:
        """Makes an empty copy with room for `texts` texts of up to `longest` tokens, and some more."""
        memory = self._memory
        self.clear()
        rows, width = max(LEAST_ROWS, 1 << (texts - 1).bit_length()), longest + BLOCK
        first, layers = self._cache.flat[0], len(self._cache.block_layers)
        heads, size = first.shape[1:]
        shape = (layers, 2, rows, heads, size, width)
        if len(memory) < math.prod(shape):
            # Freed before the larger one is made.
            del memory
            memory = torch.empty(math.prod(shape), dtype=first.dtype)
        self._memory, self._stored = memory, memory[: math.prod(shape)].view(shape)
        self._mask = torch.zeros(rows, heads, 1, width, dtype=first.dtype)
        self._rows, self._end, self._width = rows, longest, width

    def _join(self, spans: Sequence[Single]) -> None:
        """Copies the tokens of texts to new rows, to the columns up to `_end`."""
        rows, end = slice(len(self._names), len(self._names) + len(spans)), self._end
        self._names += [cast(int, span.text) for span in spans]
        self._lengths += [span.first for span in spans]
        longest = max(span.first for span in spans)
        self._mask[rows] = 0
        for row, span in enumerate(spans, rows.start):
            self._mask[row, ..., : end - span.first] = -torch.inf
        slots = torch.from_numpy(np.concatenate([_slots(span, longest) for span in spans]))
        found = torch.stack([each.index_select(0, slots) for each in self._cache.flat])
        copied = found.view(*self._stored.shape[:2], len(spans), longest, *found.shape[2:])
        # Masked, but what is there must be finite.
        self._stored[:, :, rows, ..., : end - longest] = 0
        self._stored[:, :, rows, ..., end - longest : end] = copied.permute(0, 1, 2, 4, 5, 3)

    def _cut(self) -> None:
        """Prepares what the steps of these texts have in common."""
        stored = self._stored[:, :, : len(self._names)]
        self._new = stored.transpose(1, 2)
        self._keys, values = stored.flatten(2, 3).unbind(1)
        self._values = values.transpose(2, 3)
        self._masks = self._mask[: len(self._names)].flatten(0, 1)

    def together(self) -> Together:
        """Returns what the next forward reads and writes."""
        end = self._end
        read = slice(end - max(self._lengths), end + 1)
        new = self._new[..., end].unbind()
        keys, values = self._keys[..., read].unbind(), self._values[..., read, :].unbind()
        layers = list(map(LayerColumns, new, keys, values))
        return Together(len(self._names), self._masks[..., read], layers)

    def advance(self) -> None:
        """Notes that each text has one more token."""
        self._end += 1
        self._lengths = [length + 1 for length in self._lengths]


def _slots(span: Single, length: int) -> NDArray[np.int64]:
    """Returns the places of a text's tokens among those of all blocks: the last of `length`, after those of a null."""
    slots = np.full(length, NULL * BLOCK)
    blocks = np.array(span.blocks[: blocks_for(span.first)])
    tokens = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    slots[length - span.first :] = tokens[: span.first]
    return slots
