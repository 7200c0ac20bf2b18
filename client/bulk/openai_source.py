"""Source of a bulk run: a batch file of OpenAI's API, a request in each line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from millstream.broker.contract.errors import InvalidRequest
from millstream.client.bulk.custom_ids import check_unique
from millstream.client.bulk.files import reading
from millstream.client.bulk.items import Mark, Row, RowCall, Shard
from millstream.client.bulk.sources import Lines, LineSource, parse, read_json
from millstream.client.openai.batch import BatchRequest, read_line


class OpenAISource(LineSource):
    """File of JSON lines, each {custom_id, method, url, body}. A row of the input is a request."""

    def __init__(self, path: Path, shard_rows: int) -> None:
        super().__init__(path, shard_rows, lambda lines: read_json(lines, None, None))

    def check(self) -> None:
        """Reads the whole file. Raises InvalidRequest if a custom_id is repeated."""
        check_unique(self._read_ids)

    def _read_ids(self) -> Iterator[tuple[int, str]]:
        with reading(self._path), self._path.open("rb") as file:
            for number, line in enumerate(Lines(file, 0), 1):
                value = parse(line) if line.strip() else None
                custom_id = value.get("custom_id") if isinstance(value, dict) else None
                # A line without a valid one fails by itself.
                if isinstance(custom_id, str):
                    yield number, custom_id

    def _count(self, row: Row) -> int:
        """Returns about how many rows a request has. So the memory of a shard does not depend on their number."""
        body = row.value.get("body") if isinstance(row.value, dict) else None
        given = [body.get(name) for name in ("input", "prompt", "documents")] if isinstance(body, dict) else []
        # A list of numbers is one prompt of token ids.
        lists = [each for each in given if isinstance(each, list) and each and not isinstance(each[0], int)]
        return max(map(len, lists), default=1)

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
