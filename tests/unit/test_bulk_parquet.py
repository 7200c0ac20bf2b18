"""Parquet in and out of bulk runs: rows by record batches, from any position on, and files that others read."""

from __future__ import annotations

import importlib
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed
from millstream.client.bulk import parquet_source
from millstream.client.bulk.items import Mark, Row
from millstream.client.bulk.opening import open_source
from millstream.client.bulk.sources import Source
from millstream.client.testing import GENERATOR, RERANKER, SERVICE, FakeClient

TEXTS = [f"text {row} " + "x" * (row * 7 % 30) for row in range(25)]


def opened(path: Path, column: str | None = "text", id_column: str | None = "key", shard_rows: int = 3) -> Source:
    return open_source(path, "auto", column, id_column, shard_rows)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """25 rows in row groups of 7."""
    path = tmp_path / "in.parquet"
    table = pa.table({"key": range(100, 125), "text": TEXTS, "more": [0.5] * 25})
    pq.write_table(table, path, row_group_size=7)
    return path


def test_every_row_comes_once_from_any_shard_on(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Batches end within row groups, shards within batches and across row groups.
    monkeypatch.setattr(parquet_source, "BATCH_ROWS", 2)
    found = opened(source)

    shards = list(found.read_shards(Mark()))

    assert [row for shard in shards for row in shard.rows] == [Row(100 + at, text) for at, text in enumerate(TEXTS)]
    for at, shard in enumerate(shards):
        assert list(found.read_shards(shard.begin)) == shards[at:]
        assert found.digest(shard.begin.position, shard.end.position) == shard.digest
    assert list(found.read_shards(shards[-1].end)) == []
    assert found.length() == 25


def test_a_later_row_is_read_without_the_row_groups_before_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[int]] = []
    iterate = pq.ParquetFile.iter_batches

    def spy(file: Any, *words: Any, **more: Any) -> Any:
        groups.append(more["row_groups"])
        return iterate(file, *words, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)

    (shard, *_) = opened(source).read_shards(Mark(5, 15, 15))

    assert shard.rows[0] == Row(115, TEXTS[15])
    assert groups == [[2, 3]]


def test_nulls_and_values_that_are_not_json_fail_alone(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    prices = [Decimal("1.5"), Decimal("2.5")]
    pq.write_table(pa.table({"text": ["a", None], "price": prices, "chat": [{"x": [1]}, {"x": [2]}]}), path)

    texts, decimals, objects = (
        next(iter(opened(path, column, None).read_shards(Mark()))).rows for column in ("text", "price", "chat")
    )

    assert texts[0].value == "a"
    assert "null in column 'text'" in str(texts[1].value)
    assert all("column 'price' is no JSON value" in str(row.value) for row in decimals)
    assert [row.value for row in objects] == [{"x": [1]}, {"x": [2]}]


def test_a_column_that_is_not_there_and_a_file_that_is_no_parquet_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no column 'nothing'.*'key', 'text', 'more'"):
        opened(source, "nothing")
    with pytest.raises(InvalidRequest, match="2 columns to send"):
        opened(source, None)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(InvalidRequest, match=r"no\.parquet cannot be read as Parquet"):
        opened(tmp_path / "no.parquet")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        opened(tmp_path / "missing.parquet")


def test_a_row_group_of_any_size_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    rows, text = 30_000, "some words " * 100
    pq.write_table(
        pa.table({"text": [f"{row} {text}" for row in range(rows)]}),
        path,
        compression="none",
        use_dictionary=False,
        row_group_size=rows,
    )

    path_bytes, peak = path.stat().st_size, 0
    for _ in opened(path, "text", None, 256).read_shards(Mark()):
        peak = max(peak, pa.total_allocated_bytes())

    assert path_bytes > 30_000_000
    assert peak < 8_000_000


def test_vectors_are_lists_of_fixed_size_and_null_for_failed_rows(source: Path, tmp_path: Path) -> None:
    client = FakeClient(dim=8, errors={TEXTS[7]: ModelFailed("no")})

    client.bulk(SERVICE, source, tmp_path / "out", column="text", id_column="key", format="parquet", shard_rows=10)

    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert [part.name for part in parts] == [f"part-{at:06d}.parquet" for at in range(3)]
    table = pa.concat_tables(map(pq.read_table, parts))
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert table["row"].to_pylist() == list(range(25))
    assert table["id"].to_pylist() == [str(key) for key in range(100, 125)]
    vectors = table["vector"].to_pylist()
    assert vectors[7] is None
    expected = np.asarray(client.embed([*TEXTS[:7], *TEXTS[8:]]))
    assert (np.array([*vectors[:7], *vectors[8:]], np.float32) == expected).all()


def test_duckdb_reads_all_parts_at_once(source: Path, tmp_path: Path) -> None:
    client = FakeClient(dim=8, errors={text: ModelFailed("no") for text in TEXTS[10:20]})
    client.bulk(SERVICE, source, tmp_path / "out", column="text", id_column="key", format="parquet", shard_rows=10)

    parts = duckdb.read_parquet(f"{tmp_path}/out/part-*.parquet")
    found = parts.project("row, id, vector, len(vector)").order("row").fetchall()

    assert [each[0] for each in found] == list(range(25))
    assert [each[3] for each in found] == [8] * 10 + [None] * 10 + [8] * 5
    assert np.allclose(np.linalg.norm(found[24][2]), 1.0)


def test_scores_texts_and_values_have_columns_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"one corn"\n"two"\n5\n')
    client = FakeClient(handlers={"own": lambda rows: [{"n": row} for row in rows]})

    def table_of(service: str, **options: Any) -> Any:
        client.bulk(service, tmp_path / "in.jsonl", tmp_path / service, format="parquet", **options)
        return pq.read_table(tmp_path / service / "part-000000.parquet").to_pydict()

    scores, texts, values = table_of(RERANKER, query="corn"), table_of(GENERATOR, max_tokens=1), table_of("own")

    assert scores == {"row": [0, 1, 2], "id": [None] * 3, "score": [1.0, 0.0, None]}
    assert texts["text"] == ["one ", "two", None]
    assert texts["finish_reason"] == ["length", "stop", None]
    assert texts["completion_tokens"] == [1, 1, None]
    assert [json.loads(each) for each in values["result"]] == [{"n": "one corn"}, {"n": "two"}, {"n": 5}]


def test_a_full_disk_is_named_and_leaves_no_part(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)

    with pytest.raises(MillstreamError, match=r"part-000000\.parquet cannot be written: No space left"):
        FakeClient().bulk(SERVICE, source, tmp_path / "out", column="text", format="parquet")

    assert list((tmp_path / "out").glob("*part*")) == []


def test_without_pyarrow_the_error_says_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    (tmp_path / "in.txt").write_text("a\n")

    for arguments in ((source, "jsonl"), (tmp_path / "in.txt", "parquet")):
        with pytest.raises(InvalidRequest, match=r'pip install "millstream\[bulk\]"'):
            FakeClient().bulk(SERVICE, arguments[0], tmp_path / "out", format=arguments[1])
    assert not list((tmp_path / "out").glob("part*"))
