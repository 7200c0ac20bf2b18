"""Checks that only this user can have written a data dir. Otherwise no file in it is read, run or written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from millstream.broker.contract.errors import ConfigError

_FILES = ("engine.json", "engine.new", "lock", "server.log", "server.log.old", "dump.rdb", "appendonly*", "temp-*.*")
_BELOW = "appendonlydir/*"
"""Patterns of the files that millstream and the server use in a data dir. Other files are not checked."""

_ROOT = 0


def check_private(data_dir: Path) -> None:
    """Raises ConfigError if another user may have put a file into `data_dir`, OSError if `data_dir` does not exist.

    millstream connects to the server that the data dir records, and reads and writes its files. Another user's folder,
    or a link to one, must not decide which server and which files these are.
    """
    for link in _links(data_dir):
        _check_owner(link, link.lstat(), data_dir, "is a link of")
    folder = data_dir.resolve()
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _refusal(data_dir, f"{parent}, above it, may be written by everybody", f"chmod o-w {parent}")
    found = folder.stat()
    _check_owner(folder, found, data_dir, "belongs to")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refusal(data_dir, "it may be written by others", f"check its contents, then chmod go-w {folder}")
    others_may_enter = bool(found.st_mode & (stat.S_IXGRP | stat.S_IXOTH))
    for path in _data_files(folder):
        _check_file(path, data_dir, others_may_enter=others_may_enter)


def open_private(path: Path, flags: int) -> int:
    """Opens `path` and returns its descriptor. Only its user can read or write a new file.

    Raises OSError if `path` is a link or cannot be opened.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _data_files(folder: Path) -> Iterator[Path]:
    for pattern in (*_FILES, _BELOW):
        yield from folder.glob(pattern)


def _check_file(path: Path, data_dir: Path, *, others_may_enter: bool) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return  # the server renames its files while it runs
    if stat.S_ISLNK(found.st_mode):
        raise _refusal(data_dir, f"{path.name} in it is a link", f"check its target, then rm {path}")
    _check_owner(path, found, data_dir, "belongs to")
    if others_may_enter and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refusal(data_dir, f"{path.name} in it may be written by others", f"check it, then chmod go-w {path}")


def _check_owner(path: Path, found: os.stat_result, data_dir: Path, what: str) -> None:
    owner, is_link = _owner(found), stat.S_ISLNK(found.st_mode)
    if owner == os.geteuid() or (is_link and owner == _ROOT):
        return
    whose = "it" if path == data_dir.resolve() else str(path)
    raise _refusal(data_dir, f"{whose} {what} user {owner}, not to {os.geteuid()}", "name a folder of your own")


def _owner(found: os.stat_result) -> int:
    return found.st_uid


def _links(data_dir: Path) -> Iterator[Path]:
    """Yields every step of the path that is a link."""
    path = Path(os.path.abspath(data_dir))
    yield from (step for step in (path, *path.parents) if step.is_symlink())


def _refusal(data_dir: Path, why: str, fix: str) -> ConfigError:
    return ConfigError(
        f"the data dir {data_dir} is not used: {why}", hint=f"{fix}, or set MILLSTREAM_DATA_DIR to another folder"
    )
