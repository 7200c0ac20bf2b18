"""The copy of growing texts' keys and values has what their blocks have, whoever joins and leaves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import Job, Run, load, rows_of, tokens_of

from millstream.worker.generation import columns as columns_module
from millstream.worker.generation.blocks import BLOCK, blocks_for
from millstream.worker.generation.columns import Columns, LayerColumns
from millstream.worker.generation.forward import Span
from millstream.worker.generation.kv_cache import BlockCache

LAYERS, HEADS, SIZE = 2, 2, 4


class Texts:
    """Texts with random keys and values in a cache, and their copy."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.cache = BlockCache(LAYERS)
        self.cache.grow(400, 400)
        self.columns = Columns(self.cache)
        self.free = list(range(1, 400))
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def add(self, text: int, tokens: int) -> None:
        """Adds a text whose prompt has `tokens` tokens, in the cache."""
        self.blocks[text], self.lengths[text] = [], 0
        self._write(text, tokens)

    def remove(self, text: int) -> None:
        self.free += self.blocks.pop(text)
        del self.lengths[text]

    def _write(self, text: int, tokens: int) -> list[torch.Tensor]:
        """Adds tokens to the cache. Returns their keys and values in each layer: [tokens, 2, HEADS, SIZE]."""
        first, blocks = self.lengths[text], self.blocks[text]
        while len(blocks) < blocks_for(first + tokens):
            blocks.append(self.free.pop(self.rng.randrange(len(self.free))))
        places = range(first, first + tokens)
        self.cache.slots = torch.tensor([blocks[at // BLOCK] * BLOCK + at % BLOCK for at in places])
        written = [torch.randn(tokens, 2, HEADS, SIZE) for _ in range(LAYERS)]
        for layer, new in zip(self.cache.block_layers, written, strict=True):
            layer.write(new[:, 0], new[:, 1])
        self.lengths[text] += tokens
        return written

    def step(self, names: list[int]) -> bool:
        """Adds a token to the texts `names`, and compares. Returns False if there is no copy."""
        spans = [Span([0], self.lengths[name], self.blocks[name], True, name) for name in names]
        order = self.columns.follow(spans)
        if order is None:
            return False
        assert sorted(order) == list(range(len(names)))
        rows = [names[at] for at in order]
        together = self.columns.together()
        for row, name in enumerate(rows):
            for layer, new in zip(together.layers, self._write(name, 1), strict=True):
                layer.new[row] = new[0]
        for row, name in enumerate(rows):
            empty = together.mask.shape[-1] - self.lengths[name]
            mask = together.mask.view(len(rows), HEADS, -1)[row]
            assert (mask[:, :empty] == -torch.inf).all()
            assert (mask[:, empty:] == 0).all()
            for at, layer in enumerate(together.layers):
                self._compare(layer, at, row, name, empty)
        self.columns.advance()
        return True

    def _compare(self, layer: LayerColumns, at: int, row: int, name: int, empty: int) -> None:
        stored = self.cache.block_layers[at]
        heads = slice(row * HEADS, (row + 1) * HEADS)
        copies = (layer.keys.transpose(1, 2)[heads], layer.values[heads])
        for storage, copy in zip((stored.keys, stored.values), copies, strict=True):
            assert storage is not None
            tokens = storage[self.blocks[name]].flatten(0, 1)[: self.lengths[name]].transpose(0, 1)
            assert torch.equal(copy[:, empty:], tokens)
            assert copy.isfinite().all()


@pytest.mark.parametrize("seed", range(6))
def test_a_row_has_what_the_blocks_of_its_text_have(seed: int) -> None:
    texts = Texts(seed)
    rng = texts.rng
    texts.add(0, 3)
    steps = 0

    for name in range(1, 60):
        for _ in range(rng.choice((0, 1, 5))):
            if len(texts.lengths) > 1:
                texts.remove(rng.choice(list(texts.lengths)))
        texts.add(name, rng.choice((1, 20, 63, 64, 65, 100)))
        for _ in range(rng.choice((1, 3, 40))):
            # Some texts miss a step, as less urgent ones do.
            names = [each for each in texts.lengths if rng.random() < 0.97] or list(texts.lengths)
            rng.shuffle(names)
            steps += texts.step(names)

    assert steps > 200


def test_a_row_has_nothing_left_of_a_text_with_NaN() -> None:
    texts = Texts(1)
    texts.add(1, 100)
    texts.add(2, 40)
    assert texts.step([1, 2])
    texts.columns._memory.fill_(torch.nan)
    texts.remove(1)
    texts.remove(2)
    texts.add(3, 50)

    assert texts.step([3])
    texts.add(4, 80)

    assert texts.step([3, 4])


def test_texts_of_very_different_lengths_have_no_copy() -> None:
    texts = Texts(1)
    for name in range(40):
        texts.add(name, 10)
    texts.add(40, 1_000)

    assert not texts.step(list(texts.lengths))
    assert texts.step(list(range(40)))


def test_a_copy_is_not_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(1)
    texts.add(1, 100)
    monkeypatch.setattr(columns_module, "MOST_BYTES", 100 * texts.cache.token_bytes)

    assert not texts.step([1])


def test_texts_do_not_depend_on_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import language_models

    folder = tmp_path / "model"
    language_models.save_language_model(folder, "grouped")
    model = load(folder)
    calls: list[int] = []
    attend = columns_module.Together.attend

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        calls.append(self.texts)
        return attend(self, *arguments)

    monkeypatch.setattr(columns_module.Together, "attend", counted)

    def texts() -> list[list[int]]:
        rng = random.Random(7)
        rows = rows_of(model, [Job.random(rng, most=20) for _ in range(12)], {"ignore_eos": True, "temperature": 1.0})
        outcomes = Run(model, part_tokens=30).until_done(rows, rng)
        return [tokens_of(outcomes[row.owner]) for row in rows]

    with_copy = texts()
    assert max(calls) > 3
    calls.clear()
    monkeypatch.setattr(columns_module, "MOST_BYTES", 0)

    assert texts() == with_copy
    assert not calls
