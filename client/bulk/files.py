"""Files of a bulk run's folder: each appears whole under its name, or not at all, also after a crash of the host."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from millstream.broker.contract.errors import InvalidRequest, MillstreamError

COPY_BYTES = 1024 * 1024
"""Bytes that are copied at once."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError, such as that of a full disk, into an error that names `path` and says how to go on."""
    try:
        yield
    except OSError as error:
        raise MillstreamError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="nothing that was finished is lost: make room, then run the same command again",
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into InvalidRequest that names `path`."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name, syncs it, and renames it to `path`. Raises MillstreamError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                sync(file)
            temporary.replace(path)
        except BaseException:
            # A full disk needs the room, and the next run writes the file anew.
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def append(file: io.FileIO, content: bytes) -> None:
    """Writes all of `content` to a file without a buffer, and syncs it.

    If the disk is full, what was not written is not kept in a buffer, which would be written when the file is closed.
    """
    while content:
        content = content[file.write(content) or 0 :]
    os.fsync(file.fileno())


def sync(file: BinaryIO) -> None:
    """Returns when the disk has all that was written to `file`."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the disk has the names of the files in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def spool(stream: BinaryIO, path: Path) -> None:
    """Copies `stream` to `path` if there is no such file yet: a stream can be read only once."""
    if not path.exists():
        write_whole(path, lambda file: shutil.copyfileobj(stream, file, COPY_BYTES))
