"""Sink for Parquet: a row for each row of the shard, null if it failed. Needs pyarrow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import ResultKind
from millstream.client.bulk.items import Result
from millstream.client.bulk.merging import Merge
from millstream.client.bulk.pyarrow_loading import load_pyarrow, reading_parquet
from millstream.client.generate import Generated
from millstream.client.row_results import RowOutcome


class ParquetSink:
    """Columns row, id, and those of the results, which are null if the row failed. An id that is no text is JSON.

    Dense vectors: `vector`, a list of float32 of fixed size; uint8 for binary vectors. Sparse ones: `indices` and
    `values`. Scores: `score`. Texts: `text`, `finish_reason`, the counts of tokens, `seed`, `version`, and as JSON
    `tool_calls` and `logprobs`. All other results: `result`, as JSON.
    """

    def __init__(self, kind: ResultKind) -> None:
        load_pyarrow()
        self._kind = kind

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        _, parquet = load_pyarrow()
        parquet.write_table(self._make_table(results), file)

    def merge(self, file: BinaryIO, before: Path, merge: Merge) -> None:
        arrow, parquet = load_pyarrow()
        with reading_parquet(before):
            old = parquet.read_table(before, use_threads=False)
        rows = merge.spread(before, range(len(old)))
        new = self._make_table([row for row in rows if isinstance(row, Result)])
        if len(new) == len(old):
            # A file without any result does not know the length of vectors.
            parquet.write_table(new, file)
            return
        try:
            both = arrow.concat_tables([old, new.cast(old.schema)])
        except arrow.ArrowException as error:
            raise InvalidRequest(f"the new results do not fit into {before}: {error}"[:500]) from error
        behind = iter(range(len(old), len(both)))
        order = [next(behind) if isinstance(row, Result) else at for at, row in enumerate(rows)]
        parquet.write_table(both.take(order), file)

    def _make_table(self, results: Sequence[Result]) -> Any:
        arrow, _ = load_pyarrow()
        outcomes = [result.outcome for result in results]
        columns = {
            "row": arrow.array([result.row for result in results], arrow.int64()),
            "id": arrow.array([_id_text(result.id) for result in results], arrow.string()),
        }
        return arrow.table(columns | self._make_columns(arrow, outcomes))

    def _make_columns(self, arrow: Any, outcomes: Sequence[RowOutcome]) -> dict[str, Any]:
        match self._kind:
            case "scores":
                return {"score": arrow.array([_value(each, float | int) for each in outcomes], arrow.float64())}
            case "generations":
                return _make_texts(arrow, [_value(each, Generated) for each in outcomes])
        good = [each for each in outcomes if not isinstance(each, Exception)]
        if self._kind == "vectors" and good and all(map(_is_sparse, good)):
            return _make_sparse(arrow, outcomes)
        if good and all(isinstance(each, np.ndarray) for each in good):
            return {"vector": _make_vectors(arrow, outcomes)}
        if self._kind == "vectors" and not good:
            return {"vector": arrow.nulls(len(outcomes), arrow.list_(arrow.float32()))}
        return {"result": arrow.array([_json_text(each) for each in outcomes], arrow.string())}


def _value(outcome: RowOutcome, kind: Any) -> Any:
    return outcome if isinstance(outcome, kind) else None


def _is_sparse(outcome: RowOutcome) -> bool:
    return isinstance(outcome, dict) and set(outcome) == {"indices", "values"}


def _make_vectors(arrow: Any, outcomes: Sequence[RowOutcome]) -> Any:
    """Returns a column of lists of fixed size. Raises InvalidRequest if the vectors have different lengths."""
    found = [each for each in outcomes if isinstance(each, np.ndarray)]
    if len({(each.shape, each.dtype) for each in found}) > 1:
        raise InvalidRequest("vectors of different lengths do not fit into one Parquet column", hint="use jsonl")
    dtype = np.dtype(np.uint8) if found[0].dtype.kind == "u" else np.dtype(np.float32)
    missing = np.zeros(found[0].shape, dtype)
    rows = np.stack([each if isinstance(each, np.ndarray) else missing for each in outcomes]).astype(dtype, copy=False)
    is_null = np.array([not isinstance(each, np.ndarray) for each in outcomes])
    values = arrow.array(rows.reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(values, rows.shape[1], mask=arrow.array(is_null))


def _make_sparse(arrow: Any, outcomes: Sequence[RowOutcome]) -> dict[str, Any]:
    found = [each if isinstance(each, dict) else {} for each in outcomes]
    return {
        "indices": arrow.array([each.get("indices") for each in found], arrow.list_(arrow.int32())),
        "values": arrow.array([each.get("values") for each in found], arrow.list_(arrow.float32())),
    }


def _make_texts(arrow: Any, texts: Sequence[Generated | None]) -> dict[str, Any]:
    whole = [{} if text is None else text.json() for text in texts]
    usages = [{} if text is None else text.usage for text in texts]
    columns = {
        name: arrow.array([each.get(name) for each in whole], arrow.string())
        for name in ("text", "finish_reason", "version")
    }
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        columns[name] = arrow.array([usage.get(name) for usage in usages], arrow.int64())
    columns["seed"] = arrow.array([each.get("seed") for each in whole], arrow.int64())
    for name in ("tool_calls", "logprobs"):
        columns[name] = arrow.array([_json_or_null(each.get(name)) for each in whole], arrow.string())
    return columns


def _json_or_null(value: Json) -> str | None:
    return json.dumps(value) if value else None


def _json_text(outcome: RowOutcome) -> str | None:
    if isinstance(outcome, Exception):
        return None
    return json.dumps(outcome.tolist() if isinstance(outcome, np.ndarray) else _plain(outcome))


def _plain(outcome: RowOutcome) -> Any:
    return outcome.json() if isinstance(outcome, Generated) else outcome


def _id_text(row_id: Json) -> str | None:
    if row_id is None:
        return None
    # A text that is not valid Unicode would be refused.
    text = row_id if isinstance(row_id, str) else json.dumps(row_id)
    return text.encode(errors="backslashreplace").decode()
