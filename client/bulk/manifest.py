"""Manifest of a bulk run: which input, service and options it has, and which of its shards are written.

It is a file of JSON lines that only grows. The first line is the header, each finished group of shards adds one, and so
does the end of the run, and each step of a retry of rows that failed. One process at a time may write it.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.bulk.files import append, reading, sync_folder, writing
from millstream.client.bulk.items import Mark
from millstream.client.bulk.staging import clear, put_in_place

NAME, ERRORS, SPOOL = "manifest.jsonl", "errors.jsonl", "input.spool"
"""Names of files in a run's folder: the manifest, the rows that failed, and a copy of standard input."""

VERSION = 1
"""Version of the manifest's format."""


@dataclass(frozen=True, slots=True)
class Header:
    """Everything that decides a run's results: if a field differs, the run cannot go on.

    `model` holds the fields of the service's model. `run` is a random id. `source` is the path of the input, which may
    be moved; empty if it was standard input.
    """

    input: Mapping[str, Json]
    service: str
    model: Mapping[str, Json]
    options: Mapping[str, Json]
    layout: Mapping[str, Json]
    version: int = VERSION
    run: str = field(default_factory=lambda: secrets.token_hex(16))
    source: str = ""

    def find_changes(self, now: Header) -> list[str]:
        """Returns what differs in `now`, as "service was 'a' and is 'b'"; an input's time may differ."""
        before, after = _flatten(self), _flatten(now)
        return [
            f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]


def _flatten(header: Header) -> dict[str, Json]:
    flat: dict[str, Json] = {"service": header.service, "version": header.version}
    for name in ("input", "model", "options", "layout"):
        fields: Mapping[str, Json] = getattr(header, name)
        start = "" if name == "layout" else f"{name}."
        flat |= {f"{start}{key}": value for key, value in fields.items()}
    flat.pop("input.modified", None)
    return flat


@dataclass(frozen=True, slots=True)
class Note:
    """Finished shard. `begin` and `end` are its marks; `digest` is of its input, and `fingerprint` of the weights.

    `errors_end` is the size of errors.jsonl with the shard's errors, bytes.
    """

    begin: Mark
    end: Mark
    digest: str
    failed: int
    errors_end: int
    fingerprint: str
    file: str

    @property
    def rows(self) -> int:
        """Number of rows of the shard."""
        return self.end.row - self.begin.row


@dataclass(frozen=True, slots=True)
class Retry:
    """Step of a retry of failed rows: shards that were written anew, with the rows that still fail.

    `number` counts the retries from 1; `upto` is the number of the next shard to look at, and `finished` tells whether
    this was the retry's last step. `failed` has the number of failed rows by shard; `errors_end` is the size of
    errors.jsonl then, bytes. `files` replace those of the same name, from staged files with the name `tag`.
    """

    number: int
    upto: int
    finished: bool
    failed: Mapping[str, int]
    errors_end: int
    files: Sequence[str]
    tag: str


@dataclass(slots=True)
class Record:
    """Content of a manifest. `header` is None if the run has not begun; `finished`: all rows of the input are done.

    `retry` is the last step of a retry of failed rows; `steps` is the number of them.
    """

    header: Header | None = None
    notes: list[Note] = field(default_factory=list)
    finished: bool = False
    retry: Retry | None = None
    steps: int = 0

    def apply(self, retry: Retry) -> None:
        """Changes the notes of the shards that were written anew."""
        self.notes = [replace(note, failed=retry.failed.get(str(note.begin.shard), note.failed)) for note in self.notes]
        self.notes[-1] = replace(self.notes[-1], errors_end=retry.errors_end)
        self.retry, self.steps = retry, self.steps + 1


class Manifest:
    """Manifest that is open for writing. A context manager: it is locked until the end of the block.

    Raises InvalidRequest if another process has it open, the folder is not one of a run, or the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / NAME
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
                raise InvalidRequest(
                    f"{folder} is not empty, and not the output of a bulk run", hint="give a new folder as output"
                )
            self._file = path.open("a+b", buffering=0)
        try:
            _lock(self._file, folder)
            self._record = _read(self._file, path)
            # A process that ended within a step of a retry: the step is done to its end, or never was.
            if self._record.retry:
                put_in_place(folder, self._record.retry.tag, self._record.retry.files)
            clear(folder)
            with writing(path):
                sync_folder(folder)
        except BaseException:
            self._file.close()
            raise

    @property
    def header(self) -> Header | None:
        """Header of the run; None if it has not begun."""
        return self._record.header

    @property
    def notes(self) -> list[Note]:
        """Notes of the finished shards, in order."""
        return self._record.notes

    def begin(self, header: Header) -> None:
        """Writes the header of a new run."""
        self._append({"header": cast(Json, asdict(header))})
        self._record.header = header

    def add(self, notes: Sequence[Note]) -> None:
        """Notes the shards of a finished group in one line: all or none of them. Returns when the disk has it."""
        self._append({"shards": [cast(Json, asdict(note)) for note in notes]})
        self._record.notes += notes

    @property
    def retry(self) -> Retry | None:
        """Last step of a retry of failed rows; None if there was none."""
        return self._record.retry

    @property
    def steps(self) -> int:
        """Number of all steps of retries so far."""
        return self._record.steps

    def replace(self, retry: Retry) -> None:
        """Notes a step of a retry, and puts its staged files in their places."""
        self._append({"retry": cast(Json, asdict(retry))})
        self._record.apply(retry)
        put_in_place(self.folder, retry.tag, retry.files)

    def finish(self) -> None:
        """Notes that all rows of the input are done."""
        if not self._record.finished:
            self._append({"finished": True})
            self._record.finished = True

    def _append(self, line: Json) -> None:
        with writing(self.folder / NAME):
            append(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Gives the lock back."""
        self._file.close()

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_manifest(folder: Path) -> tuple[Record, bool]:
    """Returns the content of a run's manifest, and whether a process works on the run now.

    Raises InvalidRequest if there is no run in `folder`, or its manifest is damaged.
    """
    path = folder / NAME
    with reading(path), path.open("rb") as file:
        lines = file.read()
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            works = False
        except BlockingIOError:
            works = True
    return _parse(lines[: lines.rfind(b"\n") + 1], path), works


def _lock(file: io.FileIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidRequest(f"another process works on {folder}", hint="wait for it, or end it") from None


def _read(file: io.FileIO, path: Path) -> Record:
    """Reads an open manifest, and removes a last line that was not written whole."""
    file.seek(0)
    lines = file.readall()
    whole = lines.rfind(b"\n") + 1
    if whole < len(lines):
        with writing(path):
            os.ftruncate(file.fileno(), whole)
    return _parse(lines[:whole], path)


def _parse(lines: bytes, path: Path) -> Record:
    record = Record()
    try:
        for line in lines.splitlines():
            fields = json.loads(line)
            if record.header is None:
                record.header = Header(**fields["header"])
            elif "shards" in fields:
                record.notes += map(_read_note, fields["shards"])
            elif "retry" in fields:
                record.apply(Retry(**fields["retry"]))
            else:
                record.finished = record.finished or fields["finished"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InvalidRequest(
            f"{path} cannot be read: {error}"[:300],
            hint="written by another version, or damaged: begin in a new folder",
        ) from error
    return record


def _read_note(fields: dict[str, Any]) -> Note:
    return Note(Mark(*fields.pop("begin")), Mark(*fields.pop("end")), **fields)
