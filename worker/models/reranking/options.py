"""Applies the options of a reranking job to its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.models.base import Prepared

Pairing = Callable[[RerankOptions, list[str]], Sequence[Prepared | MillstreamError]]
"""Returns one row or error for each document; the options have a `truncate`. Raises an error that all documents get."""


def answer_each(
    inputs: Sequence[Json], options: Mapping[str, Json], truncate: Truncate, pair: Pairing
) -> list[Prepared | MillstreamError]:
    """Returns for each input a row of `pair`, or an error if it is no string. Invalid options are the error of all.

    `truncate` is the default of the service: "none", "start" or "end".
    """
    try:
        question = RerankOptions.read(options)
        if question.truncate is None:
            question = question._replace(truncate=truncate)
        rows = iter(pair(question, [text for text in inputs if isinstance(text, str)]))
    except MillstreamError as error:
        return [error] * len(inputs)
    return [
        next(rows)
        if isinstance(text, str)
        else InvalidRequest(f"not a string but {type(text).__name__}", hint="rerank takes strings")
        for text in inputs
    ]
