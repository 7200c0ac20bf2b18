"""Accounts for the blocks of the KV cache: which are in use, which hold a known prefix, which are free. Pure.

A block holds attention keys and values of BLOCK tokens, in all layers. A full block is named by a digest of its tokens
and of all tokens before it, so a request whose prompt begins with the same tokens uses the same blocks. The last block
of a request that left is named, too, full or not: it may come back. Blocks that no request uses stay, named, until
their memory is needed; the one that was released first is evicted first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 64
"""Tokens of a block."""

NULL = 0
"""Block that pads tables. It belongs to no request and holds zeros."""


def blocks_for(tokens: int) -> int:
    """Returns the number of blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK)


def keys_of(tokens: Sequence[int], before: bytes = b"") -> list[bytes]:
    """Returns the names of the full blocks of `tokens`, which follow the block named `before`; b"" if none does."""
    keys = []
    for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
        before = key_of(tokens[at : at + BLOCK], before)
        keys.append(before)
    return keys


def key_of(tokens: Sequence[int], before: bytes = b"") -> bytes:
    """Returns the name of one block with `tokens`, which follows the block named `before`; b"" if none does."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """The blocks of one cache, numbered from 1. At most `most` blocks are in use or hold a prefix."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0
        self._free: list[int] = []
        self._uses: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def in_use(self) -> int:
        """Blocks that requests use; a shared block counts once."""
        return len(self._uses)

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return max(0, self.most - len(self._uses))

    def take(self, count: int) -> list[int] | None:
        """Returns blocks for one request; None, and takes none, if there are fewer than `count`."""
        if count > self.available:
            return None
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._uses[block] = 1
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self.size < self.most:
            self.size += 1
            return self.size
        return self._evict()

    def _evict(self) -> int:
        block, _ = self._unused.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Returns the blocks named by the first of `keys`, as many as are there, for one more request."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            # A block out of use needs room among those in use, which a lowered limit may deny.
            if block is None or (block in self._unused and not self.available):
                break
            self._unused.pop(block, None)
            self._uses[block] = self._uses.get(block, 0) + 1
            found.append(block)
        return found

    def take_back(self, key: bytes) -> int | None:
        """Returns the block of that name for one request, which may write to it: it loses its name.

        None if there is no such block, or another request uses it.
        """
        block = self._block_of.get(key)
        if block is None or block not in self._unused or not self.available:
            return None
        del self._unused[block]
        self._forget(block)
        self._uses[block] = 1
        return block

    def seal(self, block: int, key: bytes) -> None:
        """Names a block whose tokens are all computed. Does nothing if another block has the name."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Gives blocks of one request back. Returns those that are free now: they are in no use and have no name."""
        freed: list[int] = []
        # The last block first: a chain is of no use without its beginning, so its end is evicted before that.
        for block in reversed(blocks):
            self._uses[block] -= 1
            if self._uses[block]:
                continue
            del self._uses[block]
            if block in self._key_of:
                self._unused[block] = None
            else:
                freed.append(block)
        self._free += freed
        return freed

    def limit(self, most: int) -> None:
        """Changes the limit, to at least one block, and evicts what is over it."""
        self.most = max(1, most)
        while self._unused and len(self._uses) + len(self._unused) > self.most:
            self._free.append(self._evict())

    def compact(self) -> dict[int, int]:
        """Numbers the blocks in use from 1, and forgets all others. Returns old -> new number, in the new order."""
        while self._unused:
            self._evict()
        moved = {old: new for new, old in enumerate(sorted(self._uses), 1)}
        self._uses = {moved[old]: uses for old, uses in self._uses.items()}
        self._key_of = {moved[old]: key for old, key in self._key_of.items()}
        self._block_of = {key: block for block, key in self._key_of.items()}
        self._free, self.size = [], len(moved)
        return moved
