"""Opens the input of a bulk run: chooses the source by the format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from millstream.broker.contract.errors import InvalidRequest
from millstream.client.bulk.openai_source import OpenAISource
from millstream.client.bulk.parquet_source import ParquetSource
from millstream.client.bulk.sources import CsvSource, FolderSource, LineSource, Source, read_json, read_text

InputFormat = Literal["auto", "jsonl", "csv", "text", "folder", "parquet", "openai"]

_SUFFIXES: Mapping[str, InputFormat] = MappingProxyType(
    {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".csv": "csv",
        ".txt": "text",
        ".parquet": "parquet",
    }
)


def open_source(path: Path, kind: InputFormat, column: str | None, id_column: str | None, shard_rows: int) -> Source:
    """Returns the source that reads `path`. `kind` "auto" means: by the suffix of the name.

    Raises InvalidRequest if the file cannot be read, or the arguments do not fit it.
    """
    if kind not in get_args(InputFormat):
        raise InvalidRequest(f"input_format={kind!r} is not valid", hint=f"one of {', '.join(get_args(InputFormat))}")
    if kind == "auto":
        kind = "folder" if path.is_dir() else _SUFFIXES.get(path.suffix.lower(), "auto")
    match kind:
        case "jsonl":
            return LineSource(path, shard_rows, lambda lines: read_json(lines, column, id_column))
        case "csv":
            return CsvSource(path, shard_rows, column, id_column)
        case "parquet":
            return ParquetSource(path, shard_rows, column, id_column)
        case "auto":
            raise InvalidRequest(
                f"the name {path.name!r} does not say what the file holds",
                hint="give --input-format (input_format=): jsonl, csv, text, folder, parquet or openai",
            )
    if column is not None or id_column is not None:
        raise InvalidRequest(f"an input of the format {kind} has no columns", hint="leave out --column and --id")
    if kind == "openai":
        return OpenAISource(path, shard_rows)
    return FolderSource(path, shard_rows) if kind == "folder" else LineSource(path, shard_rows, read_text)
