"""Counts the cores of this host for a process: those it may use, and its share if other workers run there too.

Each worker process keeps a file locked while it lives, whichever server or supervisor it belongs to. The system ends
the lock with the process, so a dead worker is never counted.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from millstream.worker.measuring import cgroups
from millstream.worker.measuring.cgroups import Quota

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cores:
    """The CPUs that a process may run on, the folder of its control group, and its quota, None if there is none."""

    cpus: frozenset[int]
    group: str = ""
    quota: Quota | None = None

    @property
    def count(self) -> int:
        """Number of cores to compute with, at least one; a part of a core counts as one."""
        return max(1, min(len(self.cpus), math.ceil(self.quota.cores) if self.quota else len(self.cpus)))


def usable() -> Cores:
    """The cores of this process, by its affinity and by the CPU quota of its control groups."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found = cgroups.hierarchy()
    return Cores(frozenset(cpus), str(found.own) if found else "", cgroups.quota())


def cores() -> int:
    """Number of cores that this process may use."""
    return usable().count


def share(mine: Cores, others: Sequence[Cores]) -> int:
    """Number of cores for a process that shares its cores with `others`, at least one.

    Its CPUs are divided by the processes that run on any of them, its quota by the processes that it limits.
    """
    by_cpus = len(mine.cpus) // (1 + sum(1 for each in others if each.cpus & mine.cpus))
    if mine.quota is None:
        return max(1, by_cpus)
    limited = sum(1 for each in others if each.group and Path(each.group).is_relative_to(mine.quota.group))
    return max(1, min(by_cpus, math.ceil(mine.quota.cores) // (1 + limited)))


def _folder() -> Path:
    # A systemd service can have a private /tmp; /dev/shm is shared by all processes of a user.
    shared = Path("/dev/shm")
    return (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())) / f"millstream-cores-{os.getuid()}"


class Claims:
    """The worker processes of this user on this host, with the cores that each may use. Not thread-safe.

    Workers in a container do not see those outside of it. A quota or an affinity should limit them instead.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or _folder()
        self._file: int | None = None
        self._name = ""
        self._mine = usable()

    @property
    def share(self) -> int:
        """Number of cores for this process, shared with all other workers."""
        return share(self._mine, list(self._others()))

    def enter(self) -> None:
        """Makes other workers count this process until it ends. If the folder cannot be used, that is logged."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(self._folder)
            self._file, self._name = self._locked()
            # A child that a handler forks would share the lock, and may outlive this process.
            os.register_at_fork(after_in_child=self._forget)
        except OSError as error:
            log.warning("other workers of this host will not count this one's threads: %s", error)

    def leave(self) -> None:
        """Makes other workers count this process no longer, since it computes on another device."""
        if self._file is None:
            return
        with suppress(OSError):
            (self._folder / self._name).unlink()
        os.close(self._file)
        self._file = None

    def _forget(self) -> None:
        """Closes the parent's lock file in a forked child; the parent keeps its lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _locked(self) -> tuple[int, str]:
        """Creates the file of this process; returns descriptor and name. Others see it only after it is locked."""
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        hidden = self._folder / f".{name}"
        file = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, json.dumps({"cpus": sorted(self._mine.cpus), "group": self._mine.group}).encode())
        hidden.rename(self._folder / name)
        return file, name

    def _others(self) -> Iterator[Cores]:
        try:
            names = [each for each in os.listdir(self._folder) if not each.startswith(".") and each != self._name]
        except OSError:
            return
        for name in names:
            with suppress(OSError):
                if found := self._read(self._folder / name):
                    yield found

    def _read(self, path: Path) -> Cores | None:
        """The cores of the process that has `path` locked. If none has, removes the file and returns None."""
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _cores(file.read(), self._mine)
            path.unlink()
            return None


def _cores(text: bytes, default: Cores) -> Cores:
    """The cores in a worker's file; `default` if another version wrote it in another form."""
    try:
        record = json.loads(text)
        return Cores(frozenset(map(int, record["cpus"])), str(record["group"]))
    except (ValueError, KeyError, TypeError):
        return default


def _check_private(folder: Path) -> None:
    """Raises PermissionError if `folder` belongs to another user, or others may write to it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is no folder of this user's alone")
