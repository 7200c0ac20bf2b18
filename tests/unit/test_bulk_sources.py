"""Sources of bulk runs: every row once, in order, from any shard on; a bad row fails alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.bulk import sources
from millstream.client.bulk.items import Mark, Row, Shard
from millstream.client.bulk.opening import InputFormat, open_source
from millstream.client.bulk.sources import Source


def opened(path: Path, kind: InputFormat = "auto", column: str | None = None, id_column: str | None = None) -> Source:
    return open_source(path, kind, column, id_column, 3)


def rows_of(shards: list[Shard]) -> list[Row]:
    return [row for shard in shards for row in shard.rows]


def check_shards(source: Source) -> list[Row]:
    """The rows of a source, after each of its shards was found again from its mark, with its digest."""
    shards = list(source.read_shards(Mark()))
    for at, shard in enumerate(shards):
        assert shard.begin.shard == at
        # As texts: two errors are never equal.
        assert str(next(source.read_shards(shard.begin))) == str(shard)
        assert str(list(source.read_shards(shard.end))) == str(shards[at + 1 :])
        assert source.digest(shard.begin.position, shard.end.position) == shard.digest
        assert shard.end.row - shard.begin.row == len(shard.rows)
    return rows_of(shards)


def test_lines_of_text_are_rows_and_an_empty_line_is_one(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\nthree\nlast")

    assert [row.value for row in check_shards(opened(tmp_path / "in.txt"))] == ["one", "", "two", "three", "last"]


def test_json_lines_give_a_field_or_the_whole_value(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"n": 1, "text": "a"}\n\n{"n": 2, "text": "b"}\n"c"\n{"n": 4}\nno\n[NaN]\n{"text": "d"}\n')

    rows = check_shards(opened(path, column="text", id_column="n"))

    assert rows[:2] == [Row(1, "a"), Row(2, "b")]
    assert [type(row.value) for row in rows[2:]] == [InvalidRequest] * 5
    whole = list(opened(path).read_shards(Mark()))
    assert rows_of(whole)[0].value == {"n": 1, "text": "a"}


def test_csv_records_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'key,text\r\n1,"one\r\nline ""more"""\r\n2,two\r\n\r\n3\r\n4,four\r\n5,\r\n')

    rows = check_shards(opened(path, id_column="key"))

    assert [row.id for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row.value for row in rows if row.id != "3"] == ['one\r\nline "more"', "two", "four", ""]
    assert isinstance(rows[2].value, InvalidRequest)


def test_a_quote_that_never_ends_costs_rows_and_not_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('text\ngood\n"' + ("endless " * 1_000 + "\n") * (sources.LINE_BYTES // 4_000))

    rows = rows_of(list(opened(path).read_shards(Mark())))

    assert rows[0] == Row(None, "good")
    assert isinstance(rows[1].value, InvalidRequest)


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2", "a", "b/1", "c", ".hidden", "d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")

    rows = check_shards(opened(tmp_path))

    assert rows == [Row(name, f"text of {name}") for name in ("a", "b/1", "b/2", "c", "d")]


def test_a_line_that_is_too_long_is_cut_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LINE_BYTES", 8)
    (tmp_path / "in.txt").write_text("x" * 30 + "\n1234567\n12345678\nend\n")

    assert [row.value for row in check_shards(opened(tmp_path / "in.txt"))] == ["x" * 8, "1234567", "12345678", "end"]


def test_a_shard_ends_early_if_its_rows_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHARD_BYTES", 8)
    (tmp_path / "in.txt").write_text("long enough\na\nb\nc\nd\n")

    check_shards(opened(tmp_path / "in.txt"))

    assert [len(shard.rows) for shard in opened(tmp_path / "in.txt").read_shards(Mark())] == [1, 3, 1]


@given(values=st.lists(st.recursive(st.text(max_size=8) | st.integers() | st.booleans(), st.lists, max_leaves=4)))
def test_json_values_come_back_as_they_are(values: list[Json], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "in.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))

    assert [row.value for row in check_shards(opened(path))] == values


@pytest.mark.parametrize(
    ("name", "column", "id_column", "message"),
    [
        ("in.bin", None, None, "does not say"),
        ("missing.txt", None, None, "cannot be read"),
        ("in.txt", "text", None, "no columns"),
        ("in.csv", "other", None, "no column 'other'"),
        ("in.csv", None, None, "2 columns to send"),
    ],
)
def test_arguments_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, name: str, column: str | None, id_column: str | None, message: str
) -> None:
    (tmp_path / "in.csv").write_text("key,text\n1,a\n")
    (tmp_path / "in.txt").write_text("a\n")

    with pytest.raises(InvalidRequest, match=message):
        opened(tmp_path / name, "auto", column, id_column)
