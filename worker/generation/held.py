"""The texts that an engine holds, and the blocks of the cache that each of them has."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, cast

import torch

from millstream.worker.generation.blocks import BLOCK, BlockPool, blocks_for, key_of, keys_of
from millstream.worker.generation.kv_cache import BlockCache
from millstream.worker.generation.scheduler import MOST_LEFT_OUT, before_others
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import Rows
from millstream.worker.scheduling.batcher import Row

if TYPE_CHECKING:
    from millstream.worker.generation.sequence import Sequence


_numbers = count()


class Held:
    """One text in work. `computed`: its tokens whose keys and values are in the cache, `proven` of them without NaN.

    `keys`: names of its full blocks, of which the first `sealed` are known to other texts. `number`: no other has it.
    `passed`: see scheduler.py.
    """

    def __init__(self, row: Row[Prepared]) -> None:
        self.number = next(_numbers)
        self.row = row
        self.sequence = cast("Sequence", row.payload.features)
        self.blocks: list[int] = []
        self.computed = 0
        self.keys: list[bytes] = []
        self.sealed = 0
        self.proven = 0
        self.passed = 0

    @property
    def length(self) -> int:
        return len(self.sequence.tokens)

    @property
    def rank(self) -> int:
        return self.row.urgency[0]


class Holding:
    """Texts that run, and texts that wait for blocks, most urgent first. `pool` numbers the blocks of `cache`."""

    def __init__(self, blocks: int, cache: BlockCache) -> None:
        self.pool = BlockPool(max(1, blocks))
        self._limit = blocks
        self.running: list[Held] = []
        self.waiting: list[Held] = []
        self._cache = cache
        self._left_out = 0

    @property
    def all(self) -> list[Held]:
        return self.running + self.waiting

    @property
    def spare(self) -> int:
        """Blocks that a new text may fill: beside others each text keeps one to grow, the new one included."""
        return self.pool.available - (len(self.running) + 1 if self.running else 0)

    def limit(self, blocks: int) -> None:
        """Limits the cache to `blocks` blocks, if that is not its limit already."""
        if blocks != self._limit:
            self._limit = blocks
            self.pool.limit(blocks)

    def start(self, slots: int) -> list[Held]:
        """Starts waiting texts while there are slots and blocks. Returns those that no cache of this size can hold.

        Texts whose earlier runs had ended them are returned, too.
        """
        over: list[Held] = []
        while self.waiting:
            held = self.waiting[0]
            needed = blocks_for(held.length)
            if held.sequence.reason or needed > self.pool.most:
                over.append(self.waiting.pop(0))
                continue
            if len(self.running) >= slots or not self._start(held, needed):
                break
            self.running.append(self.waiting.pop(0))
        return over

    def _start(self, held: Held, needed: int) -> bool:
        """Gives a text `needed` blocks, those of a known prefix first. Returns False if too few are free."""
        # The last token is always computed: its logits are needed.
        held.keys = held.keys or keys_of(held.sequence.tokens[: held.length - 1])
        self._reuse(held)
        self._take_back(held)
        missing = needed - len(held.blocks)
        blocks = self.pool.take(missing) if not self.running or missing <= self.spare else None
        if blocks is None:
            self.pool.release(held.blocks)
            held.blocks = []
            held.sealed = held.computed = held.proven = 0
            return False
        held.blocks += blocks
        _note_cached(held)
        return True

    def ready(self) -> list[Held]:
        """Returns the texts to compute now, the most urgent first.

        A text waits while another computes a prefix that both share: then it can use its blocks. Texts that are less
        urgent than a realtime prompt wait for it, see `before_others`.
        """
        ready: list[Held] = []
        pending: set[bytes] = set()
        for held in sorted(self.running, key=_urgency):
            if held.computed == held.sealed * BLOCK and held.sealed < len(held.keys):
                self._reuse(held)
                _note_cached(held)
                if held.sealed < len(held.keys) and held.keys[held.sealed] in pending:
                    continue
            pending.update(held.keys[held.sealed :])
            ready.append(held)
        chosen = before_others(ready) if self._left_out < MOST_LEFT_OUT else ready
        self._left_out = self._left_out + 1 if len(chosen) < len(ready) else 0
        return chosen

    def _reuse(self, held: Held) -> None:
        """Replaces the next blocks of a text by blocks that hold the same tokens, computed."""
        first = held.sealed
        found = self.pool.match(held.keys[first:])
        if found:
            end = first + len(found)
            self.pool.release(held.blocks[first:end])
            held.blocks[first:end] = found
            held.sealed, held.computed, held.proven = end, end * BLOCK, end * BLOCK

    def _take_back(self, held: Held) -> None:
        """Gives a text that comes back the block that it had begun to fill, if it and all before it are there."""
        tail = held.sequence.tokens[held.sealed * BLOCK : held.length - 1]
        if not 0 < len(tail) < BLOCK:
            return
        block = self.pool.take_back(key_of(tail, _last_key(held)))
        if block is not None:
            held.blocks.append(block)
            held.computed = held.proven = held.length - 1

    def _leave_tail(self, held: Held) -> None:
        """Names the block that a text has begun to fill, so that it finds it if it comes back."""
        first = held.sealed * BLOCK
        if held.proven == held.computed and first < held.computed < first + BLOCK:
            tail = held.sequence.tokens[first : held.computed]
            self.pool.seal(held.blocks[held.sealed], key_of(tail, _last_key(held)))

    def reserve(self) -> tuple[list[Held], list[Held]]:
        """Gives each running text the block of its next token, the most urgent first.

        If none is free, the least urgent text leaves. Returns the texts that left, and a text that fills the whole
        cache alone.
        """
        displaced: list[Held] = []
        for held in sorted(self.running, key=_urgency):
            while held in self.running and len(held.blocks) < blocks_for(held.length):
                block = self.pool.take(1)
                if block:
                    held.blocks += block
                elif len(self.running) == 1:
                    return displaced, [held]
                else:
                    displaced.append(self._displace())
        return displaced, []

    def _displace(self) -> Held:
        held = max(self.running, key=_urgency)
        self.remove(held)
        return held

    def prove(self, held: Held) -> None:
        """Notes that the logits of a text were finite, and makes its full blocks known to others."""
        held.proven = held.computed
        full = held.computed // BLOCK
        if full <= held.sealed:
            return
        known = len(held.keys)
        if full > known:
            before = held.keys[-1] if held.keys else b""
            held.keys += keys_of(held.sequence.tokens[known * BLOCK : full * BLOCK], before)
        for at in range(held.sealed, full):
            self.pool.seal(held.blocks[at], held.keys[at])
        held.sealed = full

    def grow(self) -> None:
        """Makes the cache hold all blocks that were given. Raises if memory runs out."""
        self._cache.grow(self.pool.size, self.pool.most)

    def remove(self, held: Held) -> None:
        """Removes a text, if it is there, and frees its blocks. To come back, it needs room for all of its tokens."""
        held.row.tokens = held.length
        self.running = [each for each in self.running if each is not held]
        self.waiting = [each for each in self.waiting if each is not held]
        if held.blocks:
            freed = self.pool.release(held.blocks)
            if held.proven != held.computed:
                # NaN in a masked place would still spoil the next text that gets the block.
                self._cache.zero(freed)
            held.blocks, held.keys = [], []
            held.computed = held.proven = held.sealed = 0

    def drop(self, rows: Rows) -> None:
        """Removes the texts of `rows`, which may come back."""
        gone = set(map(id, rows))
        for held in [each for each in self.all if id(each.row) in gone]:
            self._leave_tail(held)
            self.remove(held)

    def shrink(self) -> list[Held]:
        """Lets the less urgent half of the texts leave, and frees the memory that no other text needs.

        Returns the texts that left; none if there is one text only.
        """
        displaced = [self._displace() for _ in range(len(self.running) // 2)]
        self.pool.limit(max(self.pool.in_use, self.pool.most * 3 // 4))
        moved = self.pool.compact()
        for held in self.running:
            held.blocks = [moved[block] for block in held.blocks]
        self._cache.compact({old: new for old, new in moved.items() if old < self._cache.blocks})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return displaced


def _last_key(held: Held) -> bytes:
    """Returns the name of the last full block of a text; b"" if it has none."""
    return held.keys[held.sealed - 1] if held.sealed else b""


def _note_cached(held: Held) -> None:
    """Notes how much of the prompt was computed before, for the usage. Called before any of it is computed here."""
    sequence = held.sequence
    sequence.cached = max(sequence.cached, min(held.computed, sequence.prompt_length))


def _urgency(held: Held) -> tuple[int, ...]:
    return held.row.urgency
