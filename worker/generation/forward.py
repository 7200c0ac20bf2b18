"""One forward over pieces of several texts: builds its tensors, runs the model, returns the logits of next tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from millstream.worker.generation.attention import Groups, Growing, Part
from millstream.worker.generation.blocks import BLOCK, NULL
from millstream.worker.generation.columns import Columns, Together
from millstream.worker.generation.decoder import Decoder
from millstream.worker.generation.kv_cache import BlockCache

MERGE_BLOCKS = 64
"""Blocks of padding that cost less than one more call of attention."""


class Span(NamedTuple):
    """New tokens of one text: `ids`, from the position `first` on. `blocks` hold the text. `gives` logits if asked.

    `text` names the text, if more of its tokens are to come; None if it has no name.
    """

    ids: Sequence[int]
    first: int
    blocks: Sequence[int]
    gives: bool
    text: int | None = None

    @property
    def end(self) -> int:
        return self.first + len(self.ids)


class Forward:
    """A causal language model whose attention is `attention.attend`, and the cache of its layers. One thread.

    `decoder`, if there is one, computes its layers instead of transformers.
    """

    def __init__(self, model: Any, decoder: Decoder | None = None) -> None:
        self._model = model
        self._decoder = decoder
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.cache = BlockCache(model.config.get_text_config().num_hidden_layers)
        # In lower precision the scores of the copy's attention would be rounded.
        copies = decoder is not None and self.device.type == "cpu" and self.dtype.itemsize >= 4
        self._columns = Columns(self.cache) if copies else None

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> torch.Tensor:
        """Computes `spans`: first those of one token, by their number of blocks, then the others.

        Returns the logits [spans that give, vocabulary], in order. May raise any exception.
        """
        growing = sum(len(span.ids) == 1 for span in spans)
        order = self._columns.follow(spans[:growing]) if self._columns else None
        if self._columns is None or order is None:
            return self._compute(spans, self._groups(spans), range(len(spans)))
        groups, places = self._groups(spans[growing:], growing), [*order, *range(growing, len(spans))]
        logits = self._compute(spans, groups, places, self._columns.together())
        self._columns.advance()
        return logits

    def free_copies(self) -> None:
        """Frees what growing texts have beside their blocks. It is made again if they go on."""
        if self._columns:
            self._columns.clear()

    def _compute(
        self, spans: Sequence[Span], groups: Groups, order: Sequence[int], together: Together | None = None
    ) -> torch.Tensor:
        """Runs the model over the tokens of `spans`, taken in `order`. Returns the logits in the order of `spans`."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last: dict[int, int] = {}
        for place in order:
            span = spans[place]
            ids += span.ids
            for at in range(span.first, span.end):
                positions.append(at)
                slots.append(span.blocks[at // BLOCK] * BLOCK + at % BLOCK)
            if span.gives:
                last[place] = len(ids) - 1
        places = torch.tensor([ids, positions, slots], device=self.device)
        self.cache.slots = places[2]
        giving = [last[place] for place in sorted(last)]
        keep = None if giving == list(range(len(ids))) else torch.tensor(giving, dtype=torch.long, device=self.device)
        if self._decoder:
            return self._decoder(places[0], places[1], self.cache, groups, keep, together)
        logits: torch.Tensor = self._model(
            input_ids=places[:1],
            position_ids=places[1:2],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if keep is None else keep,
            groups=groups,
        ).logits
        return logits[0]

    def _groups(self, spans: Sequence[Span], at: int = 0) -> Sequence[Growing | Part]:
        """Returns the calls of attention for `spans`, whose first token is the forward's token `at`."""
        groups: list[Growing | Part] = []
        for grows, some in groupby(spans, lambda span: len(span.ids) == 1):
            if grows:
                for few in _alike(list(some)):
                    groups.append(self._growing(few, at))
                    at += len(few)
                continue
            for span in some:
                groups.append(self._part(span, at))
                at += len(span.ids)
        return groups

    def _growing(self, spans: Sequence[Span], at: int) -> Growing:
        lengths = [span.end for span in spans]
        most = max(lengths)
        width = -(-most // BLOCK)
        tables = [block for span in spans for block in _padded(span.blocks, width)]
        mask = None
        if min(lengths) < most:
            over = torch.arange(most) >= torch.tensor(lengths).unsqueeze(1)
            mask = torch.zeros(over.shape, dtype=self.dtype).masked_fill_(over, -torch.inf)
            mask = mask.view(len(spans), 1, 1, most).to(self.device)
        return Growing(at, at + len(spans), torch.tensor(tables, device=self.device), most, mask)

    def _part(self, span: Span, at: int) -> Part:
        tokens, length = len(span.ids), span.end
        mask = None
        if span.first:
            over = torch.ones(tokens, length, dtype=torch.bool).triu_(span.first + 1)
            mask = torch.zeros(tokens, length, dtype=self.dtype).masked_fill_(over, -torch.inf).to(self.device)
        blocks = torch.tensor(span.blocks[: -(-length // BLOCK)], device=self.device)
        return Part(at, at + tokens, blocks, length, mask)


def _padded(blocks: Sequence[int], width: int) -> Sequence[int]:
    return [*blocks[:width], *[NULL] * (width - len(blocks))]


def _alike(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Yields groups of `spans`, which are in order of their blocks: a new one if it saves more than it costs."""
    first = 0
    for at in range(1, len(spans)):
        longer = len(spans[at].blocks) - len(spans[at - 1].blocks)
        if longer * (at - first) > MERGE_BLOCKS:
            yield spans[first:at]
            first = at
    yield spans[first:]
