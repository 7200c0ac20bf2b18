"""Tokenizes a query with each of its documents. If a row is too long, only the document is truncated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch

from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import InputTooLong, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.rerank import RerankOptions, Scores
from millstream.worker.models.base import Limit, Model, Prepared
from millstream.worker.models.loading.limits import find_limit, stretch_row

Activation = Callable[[torch.Tensor], torch.Tensor]

SAMPLE_OPTIONS: Mapping[str, Json] = MappingProxyType({"query": "a", "truncate": "end"})


@dataclass(slots=True, eq=False)
class Pair:
    """Features of one row: token ids by the name of the model's input, and the kind of its score.

    The score is through the model's own activation if `scores` is None. The last `query_tokens` tokens are those of the
    query, if the score is their likelihood.
    """

    ids: Mapping[str, Sequence[int]]
    scores: Scores | None
    query_tokens: int = 1


def pairs_of(rows: Sequence[Prepared]) -> list[Pair]:
    return [cast(Pair, row.features) for row in rows]


class TextPairs:
    """Pairs for a cross-encoder, whose tokenizer takes query and document as two texts. `prompt` precedes the query."""

    def __init__(self, tokenizer: Any, limit: int, prompt: str = "") -> None:
        self._tokenizer = tokenizer
        self.limit = limit
        self._prompt = prompt
        self._special = int(tokenizer.num_special_tokens_to_add(pair=True))

    def rows(self, question: RerankOptions, documents: Sequence[str]) -> list[Prepared | MillstreamError]:
        """Returns the row or error of each document. Raises InputTooLong if the query leaves no room for a document."""
        if (tokens := self.fixed_tokens(question)) >= self.limit:
            raise too_long_query(tokens, self.limit)
        if not documents:
            return []
        query = self._prompt + question.query
        ids = self._ids([query] * len(documents), list(documents))
        rows = (Pair({name: ids[name][at] for name in ids}, question.scores) for at in range(len(documents)))
        return [self._row(query, document, row, question) for document, row in zip(documents, rows, strict=True)]

    def short(self) -> Pair:
        """Returns a row of a few tokens."""
        return Pair(dict(self._ids("a", "a")), "raw")

    def fixed_tokens(self, question: RerankOptions) -> int:
        """Returns the number of tokens of a row without its document."""
        return len(self._ids(self._prompt + question.query, add_special_tokens=False)["input_ids"]) + self._special

    def _row(self, query: str, document: str, pair: Pair, question: RerankOptions) -> Prepared | MillstreamError:
        tokens = len(pair.ids["input_ids"])
        if tokens <= self.limit:
            return Prepared(tokens, pair)
        if question.truncate == "none":
            return too_long(tokens, self.limit)
        # Safe without a lock: only this thread truncates, and padding, in the main thread, does not read the side.
        self._tokenizer.truncation_side = "left" if question.truncate == "start" else "right"
        cut = self._ids(query, document, truncation="only_second", max_length=self.limit)
        return Prepared(len(cut["input_ids"]), Pair(dict(cut), question.scores), truncated=True)

    def _ids(self, *texts: str | list[str], truncation: str | bool = False, **options: object) -> Any:
        # verbose=False: no warning about long texts, which are truncated here or an error.
        return self._tokenizer(
            *texts, truncation=truncation, padding=False, return_attention_mask=False, verbose=False, **options
        )


Frame = Callable[[RerankOptions], tuple[str, str]]
"""Returns the text of a prompt before the document, query included, and the text after it."""


class Prompts:
    """Pairs for a language model: `frame` puts query and document into one prompt."""

    def __init__(self, tokenizer: Any, limit: int, frame: Frame) -> None:
        self._tokenizer = tokenizer
        self.limit = limit
        self._frame = frame

    def rows(self, question: RerankOptions, documents: Sequence[str]) -> list[Prepared | MillstreamError]:
        """Returns the row or error of each document. Raises InputTooLong if the query leaves no room for a document."""
        if (tokens := self.fixed_tokens(question)) >= self.limit:
            raise too_long_query(tokens, self.limit)
        if not documents:
            return []
        head, tail = self._frame(question)
        ids = self._ids([head + document + tail for document in documents])["input_ids"]
        return [self._row((head, document, tail), row, question) for document, row in zip(documents, ids, strict=True)]

    def short(self) -> Pair:
        """Returns a row of a few tokens."""
        return Pair({"input_ids": self._ids(["a"])["input_ids"][0]}, "raw")

    def fixed_tokens(self, question: RerankOptions) -> int:
        """Returns the number of tokens of a row without its document."""
        return sum(map(len, self._ids(list(self._frame(question)))["input_ids"]))

    def whole(self, question: RerankOptions, document: str) -> list[int]:
        """Returns the ids of a row, however long."""
        head, tail = self._frame(question)
        ids: list[int] = self._ids([head + document + tail])["input_ids"][0]
        return ids

    def _row(self, text: tuple[str, str, str], ids: list[int], question: RerankOptions) -> Prepared | MillstreamError:
        truncated = len(ids) > self.limit
        if truncated and question.truncate == "none":
            return too_long(len(ids), self.limit)
        if truncated:
            ids = self._cut(text, question.truncate)
        return Prepared(len(ids), Pair({"input_ids": ids}, question.scores), truncated)

    def _cut(self, text: tuple[str, str, str], side: Truncate | None) -> list[int]:
        """Returns the ids without the excess, which is removed from the document at `side`, "start" or "end"."""
        head, document, _ = text
        made = self._ids(["".join(text)], return_offsets_mapping=True)
        ids, spans = made["input_ids"][0], made["offset_mapping"][0]
        first, end = len(head), len(head) + len(document)
        own_tokens = [at for at, (start, stop) in enumerate(spans) if stop > first and start < end]
        excess = len(ids) - self.limit
        excess_places = set(own_tokens[:excess] if side == "start" else own_tokens[-excess:])
        return [token for at, token in enumerate(ids) if at not in excess_places]

    def _ids(self, texts: list[str], **options: object) -> Any:
        # The prompt itself contains the special tokens.
        return self._tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, verbose=False, **options
        )


def set_limit(pairs: TextPairs | Prompts, model: Model, max_length: int | None) -> Limit:
    """Sets `pairs.limit` to the limit that `model` is found to have.

    Raises ModelUnavailable if the configured `max_length` exceeds it.
    """
    short = pairs.short()

    def forward(tokens: int) -> object:
        return model.forward([Prepared(tokens, Pair(stretch_row(short.ids, tokens), short.scores))])

    limit = find_limit(pairs.limit, forward, max_length)
    pairs.limit = limit.tokens
    return limit


def too_long(tokens: int, limit: int) -> InputTooLong:
    return InputTooLong(
        f"{tokens} tokens with the query, the model reads {limit}", hint='shorten it, or pass truncate="end"'
    )


def too_long_query(tokens: int, limit: int) -> InputTooLong:
    return InputTooLong(
        f"the query alone makes {tokens} tokens, the model reads {limit} with a document", hint="shorten the query"
    )


def sample(pairs: TextPairs | Prompts, tokens: int, options: Mapping[str, Json] = SAMPLE_OPTIONS) -> str:
    """Returns a document that makes a row of about `tokens` tokens with the query of `options`."""
    return "a " * max(1, tokens - pairs.fixed_tokens(RerankOptions.read(options)))


def score(logits: torch.Tensor, pairs: Sequence[Pair], own_activation: Activation) -> list[Json]:
    """Returns the scores of `logits` [rows], each of the kind that its pair names; None is through `own_activation`."""
    ways: dict[Scores | None, Activation] = {None: own_activation, "raw": lambda each: each, "sigmoid": torch.sigmoid}
    by_kind = {how: ways[how](logits.float()).tolist() for how in {pair.scores for pair in pairs}}
    return [by_kind[pair.scores][at] for at, pair in enumerate(pairs)]
