"""Reads the CPU quotas of Linux control groups, version 1 and 2, in cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc/self")


class Quota(NamedTuple):
    """A CPU quota, in cores, and the folder of the control group that has it."""

    cores: float
    group: Path


class Hierarchy(NamedTuple):
    """The control groups that limit CPU time: their mount folder, this process's own folder, their version."""

    mount: Path
    own: Path
    version: int


def quota(proc: Path = PROC) -> Quota | None:
    """The smallest quota of this process's control group and of its parents; None if there is none."""
    found = hierarchy(proc)
    return min(_quotas(found), default=None) if found else None


def hierarchy(proc: Path = PROC) -> Hierarchy | None:
    """The control groups of this process; None on systems without any."""
    with suppress(OSError, ValueError):
        mounts, paths = _mounts(proc), _paths(proc)
        # Version 1 first: a CPU controller that it has mounted is not available in version 2.
        for version in (1, 2):
            if version in mounts and version in paths:
                root, mount = mounts[version]
                return Hierarchy(mount, mount / _below(paths[version], root), version)
    return None


def _paths(proc: Path) -> dict[int, str]:
    """Path of this process's group by version, from lines such as `0::/a.slice` and `4:cpu,cpuacct:/a`."""
    paths = {}
    for line in (proc / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths[2] = path
        elif "cpu" in controllers.split(","):
            paths[1] = path
    return paths


def _mounts(proc: Path) -> dict[int, tuple[str, Path]]:
    """The mounted group and its mount point by version; see proc_pid_mountinfo(5)."""
    mounts = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        root, mount = (_unescaped(word) for word in place.split()[3:5])
        filesystem, _, options = kind.split(" ", 2)
        if filesystem == "cgroup2":
            mounts[2] = root, Path(mount)
        elif filesystem == "cgroup" and "cpu" in options.split(","):
            mounts[1] = root, Path(mount)
    return mounts


def _unescaped(word: str) -> str:
    return word.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _below(path: str, root: str) -> str:
    """`path` relative to `root`. "." if it is outside, as a host's path is in a container: then `root` is the group."""
    inside = Path(path).is_relative_to(root) and ".." not in Path(path).parts
    return str(Path(path).relative_to(root)) if inside else "."


def _quotas(found: Hierarchy) -> Iterator[Quota]:
    group = found.own
    while True:
        with suppress(OSError, ValueError):
            if limit := _limit(group, found.version):
                yield Quota(limit, group)
        if group in (found.mount, group.parent):
            return
        group = group.parent


def _limit(group: Path, version: int) -> float | None:
    """The quota of one group, in cores; None if it has none. Raises OSError or ValueError if it cannot be read."""
    if version == 2:
        microseconds, period = (group / "cpu.max").read_text().split()
    else:
        microseconds, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    return None if microseconds in ("max", "-1") else int(microseconds) / int(period)
