"""The KV cache: for each layer the attention keys and values of all requests, in blocks that grow with need.

A forward writes its new tokens to `slots`, places in the flat list of all blocks' tokens. A layer then returns its
whole storage, and `attention.py` reads the blocks of each request. So transformers sees a cache of its own kind, and no
tensor is padded, moved or joined when requests come and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from millstream.worker.free_memory import give_back_free_memory
from millstream.worker.generation.blocks import BLOCK
from millstream.worker.scheduling.memory import is_exhaustion

FIRST_BLOCKS = 16
"""Blocks of a new cache. It doubles when it is full."""

MUCH_BYTES = 64 << 20
"""Size from which on a cache that has grown gives the memory of its smaller copy back."""


class BlockLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each [blocks, BLOCK, heads, size of a head].

    `flat`: the same two storages as lists of tokens, [blocks * BLOCK, heads, size]; none before the first forward.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: BlockCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._pair: tuple[torch.Tensor, ...] = ()
        self.flat: tuple[torch.Tensor, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not memory as it is: attention multiplies masked places by 0, and NaN times 0 is NaN.
        self._use(
            torch.zeros(self._cache.blocks, BLOCK, *each.shape[1:], dtype=each.dtype, device=each.device)
            for each in (key_states, value_states)
        )
        self.is_initialized = True

    def _use(self, storages: Iterable[torch.Tensor]) -> None:
        self.keys, self.values = self._pair = tuple(storages)
        self.flat = tuple(each.flatten(0, 1) for each in self._pair)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values of new tokens, each [1, heads, tokens, size]. Returns the storage of the layer."""
        return self.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values of new tokens, each [tokens, heads, size]. Returns the storage of the layer."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        slots = self._cache.slots
        key_tokens, value_tokens = self.flat
        key_tokens.index_copy_(0, slots, keys)
        value_tokens.index_copy_(0, slots, values)
        return self._pair[0], self._pair[1]

    def resize(self, blocks: int) -> None:
        """Copies the storage to a larger one of `blocks` blocks."""
        if self._pair:
            self._use(_resized(each, blocks, each) for each in self._pair)

    def compact(self, chosen: Sequence[int]) -> None:
        """Keeps the blocks `chosen`, in ascending order. If there is no memory for a copy, none is freed."""
        if not self._pair:
            return
        blocks = torch.tensor(chosen, device=self._pair[0].device)
        try:
            self._use(_resized(each, len(chosen), each[blocks]) for each in self._pair)
        except BaseException as error:
            if not is_exhaustion(error):
                raise
        else:
            return
        for storage in self._pair:
            for at, block in enumerate(chosen):
                storage[at] = storage[block]
        self._use(each[: len(chosen)] for each in self._pair)

    def zero(self, blocks: torch.Tensor) -> None:
        for each in self._pair:
            each[blocks] = 0

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def _resized(storage: torch.Tensor, blocks: int, source: torch.Tensor) -> torch.Tensor:
    """Returns a storage like `storage` of `blocks` blocks, which begins with the blocks of `source`."""
    resized = torch.zeros(blocks, *storage.shape[1:], dtype=storage.dtype, device=storage.device)
    resized[: source.shape[0]] = source
    return resized


class BlockCache(Cache):
    """Storage of all layers, with `blocks` blocks each, the null block included. `slots`: where a forward writes."""

    def __init__(self, layers: int) -> None:
        self.blocks = FIRST_BLOCKS
        self.slots = torch.empty(0, dtype=torch.long)
        self.block_layers = [BlockLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.block_layers))

    @property
    def flat(self) -> list[torch.Tensor]:
        """Keys and values of each layer in turn, as lists of tokens."""
        return [each for layer in self.block_layers for each in layer.flat]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all layers, which are alike; 0 before the first forward."""
        return sum(each[0].numel() * each.itemsize for each in self.flat)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.block_layers[layer_idx].update(key_states, value_states)

    @torch.inference_mode()
    def grow(self, size: int, most: int) -> None:
        """Makes room for the blocks 1 to `size`; `most` of them will be needed at most. Raises if memory runs out."""
        if size < self.blocks:
            return
        blocks = max(size + 1, min(2 * self.blocks, most + 1))
        # One layer after the other: only one of them needs its memory twice.
        for layer in self.block_layers:
            layer.resize(blocks)
        self.blocks = blocks
        if self.token_bytes * blocks * BLOCK >= MUCH_BYTES:
            give_back_free_memory()

    @torch.inference_mode()
    def compact(self, moved: dict[int, int]) -> None:
        """Keeps the null block and the blocks `moved`, old -> new number, and frees the memory of the others.

        Needs no memory: if it were to fail, blocks would have the names of others.
        """
        chosen = [0, *moved]
        for layer in self.block_layers:
            layer.compact(chosen)
        self.blocks = len(chosen)

    @torch.inference_mode()
    def zero(self, blocks: Sequence[int]) -> None:
        """Overwrites blocks that may hold NaN or infinity, which would spoil their next request."""
        stored = torch.tensor([block for block in blocks if block < self.blocks], dtype=torch.long)
        for layer in self.block_layers:
            layer.zero(stored)
