"""The engine of language models: a step computes one forward over all texts that it holds, and adds a token to each.

Texts join and leave at every step. A text holds blocks of the KV cache. If they run out, the least urgent text leaves
with what it has (`Step.displaced`); when it is admitted again, what was evicted is computed again and it goes on. So a
full cache costs time and no text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from millstream.broker.contract.errors import MillstreamError, ModelFailed, described
from millstream.broker.contract.generation import LENGTH
from millstream.broker.contract.partial import Record
from millstream.worker.engines.base import Step
from millstream.worker.generation.blocks import BLOCK
from millstream.worker.generation.forward import Forward, Span
from millstream.worker.generation.held import Held, Holding
from millstream.worker.generation.scheduler import LEAST_PART, PartSize, Piece, note_passed, plan, waiting
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import Outcome, Rows
from millstream.worker.scheduling.batcher import Budget, Row
from millstream.worker.scheduling.memory import is_exhaustion
from millstream.worker.shutdown import Ended

if TYPE_CHECKING:
    from millstream.worker.generation.record import Token

log = logging.getLogger(__name__)

Choose = Callable[[torch.Tensor, Sequence[Any]], Sequence["Token | MillstreamError"]]
"""Chooses the next token of each text: logits [texts, vocabulary] and the texts -> a token or an error for each."""


class SlotsEngine:
    """Runs at most `slots` texts at once, whose tokens fill at most `cache_tokens` of the KV cache.

    `part_tokens` limits the tokens of prompts in one forward. `prefilled` counts the tokens of prompts that were
    computed, `forwards` the forwards.
    """

    def __init__(
        self, forward: Forward, choose: Choose, slots: int, cache_tokens: int, part_tokens: int | None = None
    ) -> None:
        self._forward = forward
        self._choose = choose
        self._slots = slots
        self._size = PartSize() if part_tokens is None else PartSize(most=part_tokens)
        self._limits = (slots, cache_tokens)
        self._holding = Holding(cache_tokens // BLOCK, forward.cache)
        self.prefilled = 0
        self.forwards = 0

    @property
    def busy(self) -> bool:
        return bool(self._holding.all)

    @property
    def blocks_in_use(self) -> int:
        """Blocks of the cache that texts hold."""
        return self._holding.pool.in_use

    def room(self) -> Budget | None:
        """Returns the free slots, and the free tokens of the cache. No row may join while one waits for the cache."""
        holding = self._holding
        tokens = holding.spare * BLOCK
        rows = 0 if holding.waiting or tokens <= 0 else self._slots - len(holding.running)
        return Budget(max(0, rows), max(0, tokens), packs=True)

    def limit(self, slots: int, cache_tokens: int) -> None:
        """Uses these limits from the next step on. May be called from any thread."""
        self._limits = (slots, cache_tokens)

    def admit(self, rows: Rows) -> None:
        self._holding.waiting += [Held(row) for row in rows]

    def abort(self, rows: Rows) -> None:
        self._holding.drop(rows)

    def conclude(self, rows: Rows, reason: str) -> Sequence[Outcome]:
        outcomes = [_concluded(row, _text(row).reason or reason) for row in rows]
        self._holding.drop(rows)
        return outcomes

    def step(self) -> Step:
        """Computes one forward, and adds the tokens that it gives. A fault of a text is its outcome."""
        end = _End()
        holding = self._holding
        self._slots, cache_tokens = self._limits
        holding.limit(cache_tokens // BLOCK)
        try:
            for held in holding.start(self._slots):
                self._end_unstarted(held, end)
            displaced, full = holding.reserve()
            end.finish(full, LENGTH)
            for held in end.over:
                holding.remove(held)
            pieces = self._pieces()
            displaced += self._compute(pieces, end) if pieces else []
        finally:
            for held in end.over:
                holding.remove(held)
        computed = sum(piece.end - piece.first for piece in pieces)
        return Step(
            [held.row for held in end.over],
            end.outcomes,
            end.records,
            ran=len(end.over),
            tokens=computed,
            displaced=[held.row for held in displaced],
        )

    def _end_unstarted(self, held: Held, end: _End) -> None:
        """Ends a text that earlier runs had ended, or that is longer than the cache."""
        if held.sequence.reason or held.sequence.generated:
            end.finish([held], LENGTH)
        else:
            tokens = self._holding.pool.most * BLOCK
            end.fail(held, ModelFailed(f"a prompt of {held.length} tokens, and the cache now holds {tokens}"))

    def _pieces(self) -> list[Piece]:
        texts = self._holding.ready()
        growing = sum(held.length - held.computed == 1 for held in texts)
        pieces = plan(texts, self._size.tokens(growing, waiting(texts)))
        note_passed(texts, pieces)
        return pieces

    def _compute(self, pieces: Sequence[Piece], end: _End) -> list[Held]:
        """Runs a forward over `pieces` and adds the tokens. Returns the texts that left because memory ran out."""
        began = time.perf_counter()
        try:
            self._holding.grow()
            self._run(pieces, end)
        except Ended:
            raise
        except BaseException as error:
            if not is_exhaustion(error):
                raise
        else:
            growing = sum(piece.grows for piece in pieces)
            parts = sum(piece.end - piece.first for piece in pieces) - growing
            self.prefilled += parts
            self._size.observe(growing, parts, time.perf_counter() - began)
            return []
        # Outside of the except block: a handled error keeps the memory of its forward allocated.
        return self._shrink(end)

    def _run(self, pieces: Sequence[Piece], end: _End) -> None:
        """Runs a forward and adds the tokens that it gives. If it fails, its pieces run in parts.

        Raises the error if memory runs out.
        """
        try:
            logits = self._forward.run([_span(piece) for piece in pieces])
        except Ended:
            raise
        except BaseException as error:
            if is_exhaustion(error):
                raise
            failure = error if isinstance(error, MillstreamError) else ModelFailed(described(error))
        else:
            self.forwards += 1
            for piece in pieces:
                piece.text.computed = piece.end
            if giving := [cast(Held, piece.text) for piece in pieces if piece.gives_token]:
                self._add(logits, giving, end)
            return
        if len(pieces) == 1:
            held = cast(Held, pieces[0].text)
            held.proven = -1
            end.fail(held, failure)
            return
        half = len(pieces) // 2
        self._run(pieces[:half], end)
        self._run(pieces[half:], end)

    def _add(self, logits: torch.Tensor, texts: Sequence[Held], end: _End) -> None:
        """Adds a token to each text. `logits`: [texts, vocabulary]."""
        for held, token in zip(texts, self._chosen(logits, texts), strict=True):
            if isinstance(token, MillstreamError):
                end.fail(held, token)
                continue
            self._holding.prove(held)
            try:
                record, reason = held.sequence.add(token)
            except Exception as error:  # noqa: BLE001 - a fault of one text, for example of its grammar
                end.fail(held, _failure(error))
                continue
            if record.text or record.state:
                end.records.append((held.row, record))
            if reason:
                end.finish([held], reason)

    def _chosen(self, logits: torch.Tensor, texts: Sequence[Held]) -> Sequence[Token | MillstreamError]:
        """Returns the next token of each text, or its error."""
        sequences = [held.sequence for held in texts]
        try:
            return self._choose(logits, sequences)
        except Ended:
            raise
        except Exception as error:  # noqa: BLE001 - one text's fault must not end the others
            if len(texts) == 1:
                return [_failure(error)]
        return [each for at in range(len(texts)) for each in self._chosen(logits[at : at + 1], texts[at : at + 1])]

    def _shrink(self, end: _End) -> list[Held]:
        """Makes room after memory ran out. Returns the less urgent half of the texts, which leave."""
        for held in end.over:
            self._holding.remove(held)
        self._forward.free_copies()
        displaced = self._holding.shrink()
        # Short parts cost much time, so a text that is not alone leaves instead.
        self._size.most = max(min(LEAST_PART, self._size.most) if displaced else 1, self._size.most // 2)
        if not displaced and self._size.most == 1 and self._holding.running:
            end.fail(self._holding.running[0], ModelFailed("the model ran out of memory on this text alone"))
            # No part is small enough, so their size is not the cause: other prompts need not be computed so slowly.
            self._size.most = LEAST_PART
        log.warning("out of memory: the cache holds at most %d tokens from now on", self._holding.pool.most * BLOCK)
        return displaced


class _End:
    """Collects the results of a step."""

    def __init__(self) -> None:
        self.over: list[Held] = []
        self.outcomes: list[Outcome] = []
        self.records: list[tuple[Row[Prepared], Record]] = []

    def finish(self, texts: Sequence[Held], reason: str) -> None:
        for held in texts:
            self.over.append(held)
            self.outcomes.append(_concluded(held.row, held.sequence.reason or reason))

    def fail(self, held: Held, error: MillstreamError) -> None:
        self.over.append(held)
        self.outcomes.append(error)


def _span(piece: Piece) -> Span:
    held = cast(Held, piece.text)
    return Span(held.sequence.tokens[piece.first : piece.end], piece.first, held.blocks, piece.gives_token, held.number)


def _text(row: Row[Prepared]) -> Any:
    return row.payload.features


def _concluded(row: Row[Prepared], reason: str) -> Outcome:
    try:
        return cast(Outcome, _text(row).conclude(reason))
    except Exception as error:  # noqa: BLE001 - a fault of one text
        return _failure(error)


def _failure(error: Exception) -> MillstreamError:
    return error if isinstance(error, MillstreamError) else ModelFailed(described(error))
