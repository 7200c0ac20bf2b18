"""The manifest of a bulk run: what was noted is there, half a line is not, and one process writes at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from millstream.broker.contract.errors import InvalidRequest
from millstream.client.bulk.items import Mark
from millstream.client.bulk.manifest import NAME, Header, Manifest, Note, Record, read_manifest

HEADER = Header({"size": 3, "modified": 1}, "embed", {"ref": "m"}, {"dimensions": 4}, {"format": "jsonl"})
NOTES = [Note(Mark(at, 2 * at, 9 * at), Mark(at + 1, 2 * at + 2, 9 * at + 9), "d", at, 5, "f", "p") for at in range(3)]


def begun(folder: Path) -> None:
    with Manifest(folder) as manifest:
        assert manifest.header is None
        manifest.begin(HEADER)
        for note in NOTES:
            manifest.add([note])


def test_a_later_process_reads_what_was_noted_and_goes_on(tmp_path: Path) -> None:
    begun(tmp_path / "out")

    with Manifest(tmp_path / "out") as manifest:
        assert (manifest.header, manifest.notes) == (HEADER, NOTES)
        manifest.add([NOTES[0]])

        assert read_manifest(tmp_path / "out") == (Record(HEADER, [*NOTES, NOTES[0]]), True)
        manifest.finish()
        manifest.finish()

    assert read_manifest(tmp_path / "out") == (Record(HEADER, [*NOTES, NOTES[0]], finished=True), False)


def test_half_a_line_at_the_end_is_removed(tmp_path: Path) -> None:
    begun(tmp_path)
    lines = (tmp_path / NAME).read_bytes()
    ends = [at for at in range(len(lines) + 1) if lines[:at].endswith(b"\n")]

    for cut in sorted({*range(0, len(lines), 40), *ends, *(end - 1 for end in ends if end)}):
        (tmp_path / NAME).write_bytes(lines[:cut])
        with Manifest(tmp_path) as manifest:
            complete = len([end for end in ends if end <= cut])
            assert len(manifest.notes) == max(0, complete - 1)
            assert (manifest.header is None) == (complete == 0)
            (manifest.begin(HEADER) if manifest.header is None else manifest.add([NOTES[2]]))
        with Manifest(tmp_path) as manifest:
            assert manifest.header == HEADER


def test_a_second_process_is_refused_while_the_first_one_works(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        manifest.begin(HEADER)
        with pytest.raises(InvalidRequest, match="another process"):
            Manifest(tmp_path)
        assert read_manifest(tmp_path)[1]
    assert not read_manifest(tmp_path)[1]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()

    with pytest.raises(InvalidRequest, match="not empty"):
        Manifest(tmp_path)


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes().replace(b'"begin":[1', b'"begin":1]'))

    with pytest.raises(InvalidRequest, match="cannot be read"):
        Manifest(tmp_path)


@pytest.mark.parametrize(
    ("now", "change"),
    [
        (replace(HEADER, version=2), "version was 1 and is 2"),
        (replace(HEADER, service="other"), "service was 'embed' and is 'other'"),
        (replace(HEADER, model={"ref": "n"}), "model.ref was 'm' and is 'n'"),
        (replace(HEADER, options={}), "options.dimensions was 4 and is None"),
        (replace(HEADER, layout={"format": "csv"}), "format was 'jsonl' and is 'csv'"),
        (replace(HEADER, input={"size": 4, "modified": 1}), "input.size was 3 and is 4"),
    ],
)
def test_what_changed_is_named(now: Header, change: str) -> None:
    assert HEADER.find_changes(now) == [change]


def test_another_time_of_the_input_is_no_change_by_itself() -> None:
    assert HEADER.find_changes(replace(HEADER, input={"size": 3, "modified": 2}, run="other", source="b")) == []
