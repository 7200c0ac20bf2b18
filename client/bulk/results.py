"""Results of a shard: the outcomes of the rows that were sent, as the rows of the output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json
from millstream.client.bulk.items import Result, Shard
from millstream.client.openai.answers import Stamp, answer
from millstream.client.openai.batch import BatchRequest, write_line
from millstream.client.openai.requests import OpenAICall
from millstream.client.row_results import RowOutcome


def collect(
    shard: Shard, outcomes: Sequence[RowOutcome], tokens: Sequence[int], run: str, service: str, created: int
) -> list[Result]:
    """Returns the results of a shard, in order. `outcomes` and `tokens` are those of its rows.

    `run`, `service` and `created`, seconds since 1970, go into answers in OpenAI's shape; other inputs have none.
    """
    numbers = shard.numbers or range(shard.begin.row, shard.end.row)
    if shard.requests is None:
        return [
            Result(number, row.id, outcome) for number, row, outcome in zip(numbers, shard.rows, outcomes, strict=True)
        ]
    each_outcome, each_tokens = iter(outcomes), iter(tokens)
    results = list[Result]()
    for number, request in zip(numbers, shard.requests, strict=True):
        stamp = Stamp(hashlib.sha256(f"{run}:{number}".encode()).hexdigest()[:24], service, created)
        results.append(_answer(request, number, each_outcome, each_tokens, stamp))
    return results


def _answer(
    request: BatchRequest, number: int, outcomes: Iterator[RowOutcome], tokens: Iterator[int], stamp: Stamp
) -> Result:
    call = request.call
    if not isinstance(call, OpenAICall):
        # A request that cannot be read has one row, which failed.
        next(outcomes), next(tokens)
        return _fail(request, number, call, stamp)
    count = len(call.rows)
    own, spent = list(islice(outcomes, count)), sum(islice(tokens, count))
    try:
        body: dict[str, Json] = answer(call, own, spent, stamp)
    except MillstreamError as error:
        return _fail(request, number, error, stamp)
    return Result(number, request.custom_id, body, write_line(stamp.id, request.custom_id, body))


def _fail(request: BatchRequest, number: int, error: MillstreamError, stamp: Stamp) -> Result:
    return Result(number, request.custom_id, error, write_line(stamp.id, request.custom_id, error))
