"""What `rerank` asks of a service, and what it returns: documents by their score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

from millstream.broker.contract.errors import InvalidRequest, did_you_mean
from millstream.broker.contract.job import Json
from millstream.broker.contract.scalars import plain
from millstream.client.result import Embeddings, Timings, Values

Scores = Literal["sigmoid", "raw"]
OPTIONS = ("query", "scores", "instruction", "truncate")
"""What a reranker can be told beside its documents."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document's score. `index` is its place in the call; `document` is there where the call asked for it."""

    index: int
    score: float
    document: str | None = None


class Ranking(list[Ranked]):
    """The best documents first; equal scores keep the documents' order.

    `usage["tokens"]` counts the tokens that ran for all documents, with the query where it was read beside each of
    them; `truncated` lists the documents that were cut, by their place in the call; `timings` and `fingerprint` are as
    of Embeddings.
    """

    usage: Mapping[str, int] = MappingProxyType({})
    truncated: tuple[int, ...] = ()
    timings: Timings = MappingProxyType({})
    fingerprint: str = ""

    @classmethod
    def of(cls, result: Embeddings | list[Json], top_n: int | None, documents: Sequence[str] | None) -> Ranking:
        """The first `top_n` by the scores of a call's `result`, with their documents where those are given."""
        scores = cast(list[float], result)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
        texts = [None] * len(scores) if documents is None else documents
        ranking = cls(Ranked(index, scores[index], texts[index]) for index in order)
        if isinstance(result, Values):
            ranking.usage, ranking.truncated, ranking.timings = result.usage, result.truncated, result.timings
            ranking.fingerprint = result.fingerprint
        return ranking


def question(
    query: str, top_n: int | None, scores: Scores | None, instruction: str | None, truncate: str | None
) -> dict[str, Json]:
    """The options of a call; what is None is left out. Raises InvalidRequest where `top_n` is no number of them."""
    query, top_n = cast(tuple[str, int | None], (plain(query), plain(top_n)))
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        raise InvalidRequest(f"top_n={top_n!r} is not a number of documents above 0", hint="None ranks all")
    options: dict[str, Json] = {"query": query, "scores": scores, "instruction": instruction, "truncate": truncate}
    return {name: value for name, value in options.items() if value is not None}


def copied(documents: Sequence[str]) -> Sequence[str]:
    """A list of its own for a call: what is ranked is what was sent, whatever the caller does to its list meanwhile.

    What is no list is left as it is, for the call to refuse.
    """
    return list(documents) if isinstance(documents, list | tuple) else documents


def check_question(options: Mapping[str, Json]) -> int:
    """The UTF-8 bytes of what is read with each document. Raises InvalidRequest."""
    for name in options:
        if name not in OPTIONS:
            nearest = did_you_mean(name, OPTIONS)
            raise InvalidRequest(f"a reranker has no option {name!r}", hint=nearest or f"one of {', '.join(OPTIONS)}")
    query, instruction = options.get("query"), options.get("instruction") or ""
    if not isinstance(query, str):
        given = "no query" if query is None else f"a query that is no string but {type(query).__name__}"
        raise InvalidRequest(f"{given} to rank documents by", hint='query="..."')
    if not isinstance(instruction, str):
        raise InvalidRequest(f"instruction is no string but {type(instruction).__name__}")
    if options.get("scores") not in (None, *get_args(Scores)):
        raise InvalidRequest(f"scores={options['scores']!r}", hint=f"one of {', '.join(get_args(Scores))}")
    return len(query.encode()) + len(instruction.encode())
