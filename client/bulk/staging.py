"""Files that replace others of a run's folder together: written beside them, noted in the manifest, then renamed.

The manifest's note is the moment of the change. After a crash before it the staged files are removed; after a crash
behind it the renames are done by the next process that opens the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from millstream.client.bulk.files import sync_folder, write_whole, writing

_PREFIX = ".staged-"


def stage(folder: Path, tag: str, name: str, write: Callable[[BinaryIO], object]) -> int:
    """Writes the new content of the file `name` beside it, and returns its size, bytes. `tag` names the change.

    Raises MillstreamError.
    """
    path = _staged(folder, tag, name)
    write_whole(path, write)
    return path.stat().st_size


def put_in_place(folder: Path, tag: str, names: Sequence[str]) -> None:
    """Renames the staged files of a change that is noted. Those that were renamed before are left as they are."""
    with writing(folder):
        for name in names:
            with suppress(FileNotFoundError):
                _staged(folder, tag, name).replace(folder / name)
        sync_folder(folder)


def clear(folder: Path) -> None:
    """Removes staged files: those of changes that were not noted."""
    for pattern in (f"{_PREFIX}*", f".{_PREFIX}*"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                path.unlink()


def _staged(folder: Path, tag: str, name: str) -> Path:
    return folder / f"{_PREFIX}{tag}-{name}"
