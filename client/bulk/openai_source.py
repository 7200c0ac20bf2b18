"""Source of a bulk run: a batch file of OpenAI's API, a request in each line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from millstream.broker.contract.errors import InvalidRequest
from millstream.client.bulk.items import Mark, Row, RowCall, Shard
from millstream.client.bulk.sources import LineSource, read_json
from millstream.client.openai.batch import BatchRequest, read_line


class OpenAISource(LineSource):
    """File of JSON lines, each {custom_id, method, url, body}. A row of the input is a request."""

    def __init__(self, path: Path, shard_rows: int) -> None:
        super().__init__(path, shard_rows, lambda lines: read_json(lines, None, None))

    def _make_shard(self, begin: Mark, end: Mark, rows: Sequence[Row], digest: str) -> Shard:
        requests = [
            BatchRequest(None, row.value) if isinstance(row.value, InvalidRequest) else read_line(row.value)
            for row in rows
        ]
        return Shard(begin, end, [row for request in requests for row in expand(request)], digest, requests)


def expand(request: BatchRequest) -> Iterator[Row]:
    """Yields what is sent for a request: its texts, prompts or documents. One that cannot be read has one row."""
    call = request.call
    if isinstance(call, InvalidRequest):
        yield Row(request.custom_id, call)
        return
    own = RowCall(call.op, call.options)
    for value in call.rows:
        yield Row(request.custom_id, value, own)
