"""Result of a rerank call: documents ranked by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.scalars import plain
from millstream.client.result import Embeddings, Timings, Values


@dataclass(frozen=True, slots=True)
class Ranked:
    """Score of one document. `index` is its place in the call; `document` is None unless the call asked for it."""

    index: int
    score: float
    document: str | None = None


class Ranking(list[Ranked]):
    """Ranked documents, the best first; equal scores keep the documents' order.

    `usage["tokens"]` counts the tokens that the model ran for all documents, including the query if it is read with
    each of them; `truncated` lists the documents that were cut, by their place in the call; `timings`, `fingerprint`
    and `version` are those of Embeddings.
    """

    usage: Mapping[str, int] = MappingProxyType({})
    truncated: tuple[int, ...] = ()
    timings: Timings = MappingProxyType({})
    fingerprint: str = ""
    version: str = ""

    @classmethod
    def of(cls, result: Embeddings | list[Json], top_n: int | None, documents: Sequence[str] | None) -> Ranking:
        """Ranks by the scores in a call's `result` and returns the best `top_n`, with `documents` if given."""
        scores = cast(list[float], result)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
        texts = [None] * len(scores) if documents is None else documents
        ranking = cls(Ranked(index, scores[index], texts[index]) for index in order)
        if isinstance(result, Values):
            ranking.usage, ranking.truncated, ranking.timings = result.usage, result.truncated, result.timings
            ranking.fingerprint, ranking.version = result.fingerprint, result.version
        return ranking


def check_top_n(top_n: int | None) -> None:
    """Raises InvalidRequest if `top_n` is neither None nor an int above 0."""
    count = plain(top_n)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise InvalidRequest(f"top_n={count!r} is not a number of documents above 0", hint="None ranks all")


def copy_documents(documents: Sequence[str]) -> Sequence[str]:
    """Returns a copy of `documents`, which the caller may change while the call is in flight.

    Other types than list and tuple are returned as they are, for the call to refuse.
    """
    return list(documents) if isinstance(documents, list | tuple) else documents
