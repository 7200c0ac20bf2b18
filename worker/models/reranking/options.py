"""Reads and checks the options of a reranking job: query, scores, instruction, truncate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.worker.models.base import Prepared

SCORES = ("", "raw", "sigmoid")
"""Kinds of scores: by the model's own activation (""), the logit ("raw"), or the logit through a sigmoid."""


class RerankOptions(NamedTuple):
    """Checked options of a job. `truncate` is "none", "start" or "end"; "" as `instruction` means the model's own."""

    query: str
    scores: str
    instruction: str
    truncate: str

    @classmethod
    def of(cls, options: Mapping[str, Json], truncate: str) -> RerankOptions:
        """Reads a job's options; `truncate` is the default. Raises InvalidRequest."""
        query, scores, instruction, side = (
            options.get("query"),
            options.get("scores") or "",
            options.get("instruction") or "",
            options.get("truncate", truncate),
        )
        if not isinstance(query, str):
            raise InvalidRequest("rerank needs `query`, a string", hint='query="..."')
        if scores not in SCORES:
            raise InvalidRequest(f"scores={scores!r}", hint='"raw" or "sigmoid"')
        if not isinstance(instruction, str):
            raise InvalidRequest("`instruction` must be a string")
        return cls(query, str(scores), instruction, side if side in ("start", "end") else "none")


Pairing = Callable[[RerankOptions, list[str]], Sequence[Prepared | MillstreamError]]
"""Returns one row or error for each document. Raises an error that all documents get."""


def answer_each(
    inputs: Sequence[Json], options: Mapping[str, Json], truncate: str, pair: Pairing
) -> list[Prepared | MillstreamError]:
    """Returns for each input a row of `pair`, or an error if it is no string. Invalid options are the error of all."""
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
