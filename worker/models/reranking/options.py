"""What a reranking job asks of its documents: the query and the rest of the job's options, read with distrust."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.worker.models.base import Prepared

SCORES = ("", "raw", "sigmoid")
"""How scores are given: as the model gives them by itself, as they leave it, through a sigmoid."""


class RerankOptions(NamedTuple):
    """One query to rank documents by. `truncate` is "none", "start" or "end"; an empty `instruction` is the model's."""

    query: str
    scores: str
    instruction: str
    truncate: str

    @classmethod
    def of(cls, options: Mapping[str, Json], truncate: str) -> RerankOptions:
        """The question of a job's options; `truncate` where they say nothing. Raises InvalidRequest."""
        query, scores, instruction, side = (
            options.get("query"),
            options.get("scores") or "",
            options.get("instruction") or "",
            options.get("truncate", truncate),
        )
        if not isinstance(query, str):
            raise InvalidRequest("no query to rank by, or none that is a string", hint='query="..."')
        if scores not in SCORES:
            raise InvalidRequest(f"scores={scores!r}", hint='"raw" or "sigmoid"')
        if not isinstance(instruction, str):
            raise InvalidRequest("an instruction that is no string")
        return cls(query, str(scores), instruction, side if side in ("start", "end") else "none")


Pairing = Callable[[RerankOptions, list[str]], Sequence[Prepared | MillstreamError]]
"""The rows of a question's documents, or an error each. Raises the error that they all get."""


def answer_each(
    inputs: Sequence[Json], options: Mapping[str, Json], truncate: str, pair: Pairing
) -> list[Prepared | MillstreamError]:
    """Each input as `pair` makes it a row, what is no string as an error; all as one where the question is at fault."""
    try:
        question = RerankOptions.of(options, truncate)
        rows = iter(pair(question, [text for text in inputs if isinstance(text, str)]))
    except MillstreamError as error:
        return [error] * len(inputs)
    return [
        next(rows)
        if isinstance(text, str)
        else InvalidRequest(f"not a string but {type(text).__name__}", hint="rerank takes strings")
        for text in inputs
    ]
