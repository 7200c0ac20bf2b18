"""The cores that a process computes with: its affinity, the quotas of its control groups, its share beside others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.worker.measuring.cgroups import Quota, quota
from millstream.worker.measuring.cores import Claims, Cores, cores, share, usable

HELD = r"""
import os, sys
from pathlib import Path
from millstream.worker.measuring.cores import Claims
claims = Claims(Path(sys.argv[1]))
claims.enter()
if "fork" in sys.argv and (child := os.fork()):
    os.write(1, b"%d\n" % child)
# One write, so that a line of the forked child never lands inside one of its parent's.
os.write(1, b"entered\n")
sys.stdin.read()
"""


class System:
    """A /proc/self and the folders of control groups, as a kernel shows them."""

    def __init__(self, home: Path) -> None:
        self.proc, self.mount = home / "proc", home / "sys fs"
        self.proc.mkdir()
        self.mount.mkdir()

    def version_2(self, path: str, root: str = "/") -> None:
        self._says(f"0::{path}", root, "cgroup2 cgroup2 rw,nsdelegate")

    def version_1(self, path: str, root: str = "/") -> None:
        self._says(
            f"5:memory:/else\n4:cpu,cpuacct:{path}\n1:name=systemd:/else\n0::/else", root, "cgroup cgroup rw,cpu"
        )

    def limit(self, path: str, text: str) -> None:
        """`text` as the kernel has it in version 2, and the same in version 1."""
        group = self.mount / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "cpu.max").write_text(text + "\n")
        microseconds, period = text.split()
        (group / "cpu.cfs_quota_us").write_text(f"{-1 if microseconds == 'max' else microseconds}\n")
        (group / "cpu.cfs_period_us").write_text(f"{period}\n")

    def _says(self, groups: str, root: str, kind: str) -> None:
        (self.proc / "cgroup").write_text(groups + "\n")
        mount = str(self.mount).replace(" ", "\\040")
        lines = [
            "22 1 0:21 / /proc rw,relatime shared:5 - proc proc rw",
            f"30 1 0:26 {root} {mount} rw shared:4 - {kind}",
        ]
        (self.proc / "mountinfo").write_text("\n".join(lines) + "\n")


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


@pytest.fixture(params=[1, 2])
def groups(request: pytest.FixtureRequest, system: System) -> System:
    """A process in /a/b of either version, without a quota."""
    (system.version_1 if request.param == 1 else system.version_2)("/a/b")
    system.limit("a/b", "max 100000")
    return system


def test_the_quota_of_ones_own_group_counts(groups: System) -> None:
    assert quota(groups.proc) is None

    groups.limit("a/b", "150000 100000")

    assert quota(groups.proc) == Quota(1.5, groups.mount / "a/b")


def test_a_tighter_quota_of_a_group_around_it_counts(groups: System) -> None:
    groups.limit("a/b", "800000 100000")
    groups.limit("a", "100000 50000")
    groups.limit(".", "400000 100000")
    groups.limit("a/b/c", "10000 100000")
    groups.limit("other", "10000 100000")

    assert quota(groups.proc) == Quota(2.0, groups.mount / "a")


@pytest.mark.parametrize("path", ["/docker/abc", "/../../abc"])
def test_a_container_that_sees_its_own_group_alone_reads_it(system: System, path: str) -> None:
    system.version_2(path, root="/docker/abc")
    system.limit(".", "300000 100000")

    assert quota(system.proc) == Quota(3.0, system.mount)


def test_a_container_whose_path_is_the_hosts_reads_what_is_mounted(system: System) -> None:
    system.version_1("/docker/abc", root="/docker/abc/below")
    system.limit(".", "300000 100000")

    assert quota(system.proc) == Quota(3.0, system.mount)


def test_a_system_without_groups_or_with_unreadable_ones_has_no_quota(system: System) -> None:
    assert quota(system.proc) is None

    system.version_2("/a")
    system.limit("a", "what else")

    assert quota(system.proc) is None


def test_this_process_has_the_cores_of_its_affinity_or_fewer() -> None:
    assert 1 <= cores() <= len(os.sched_getaffinity(0))


def of(*cpus: int, group: str = "/g/own", limit: float | None = None, at: str = "/g") -> Cores:
    return Cores(frozenset(cpus), group, None if limit is None else Quota(limit, Path(at)))


@pytest.mark.parametrize(
    ("mine", "count"),
    [(of(0, 1, 2, 3), 4), (of(0, 1, limit=8), 2), (of(0, 1, 2, 3, limit=1.5), 2), (of(0, limit=0.2), 1)],
)
def test_a_quota_counts_as_cores(mine: Cores, count: int) -> None:
    assert mine.count == share(mine, []) == count


@pytest.mark.parametrize(
    ("mine", "others", "count"),
    [
        (of(0, 1), [of(0, 1)], 1),
        (of(0, 1), [of(0, 1)] * 5, 1),
        (of(*range(8)), [of(*range(8))] * 2, 2),
        # On other CPUs.
        (of(0, 1), [of(2, 3)], 2),
        (of(0, 1, 2, 3), [of(3, 4)], 2),
        # Within the same quota, and outside of it.
        (of(*range(16), limit=4), [of(*range(16), group="/g/other")], 2),
        (of(*range(16), limit=4), [of(*range(16), group="/elsewhere")], 4),
        (of(*range(16), limit=4), [of(*range(16), group="")] * 7, 2),
    ],
)
def test_a_share_is_divided_among_those_who_use_the_same_cores(mine: Cores, others: list[Cores], count: int) -> None:
    assert share(mine, others) == count


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another worker process of this host."""
    command = [sys.executable, "-c", HELD, str(tmp_path / "claims")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "entered\n"
    yield process
    process.kill()
    process.communicate()


def test_workers_of_one_host_share_its_cores_while_they_live(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    mine, folder = usable(), tmp_path / "claims"
    claims = Claims(folder)
    claims.enter()
    assert claims.share == share(mine, [mine])

    other.kill()
    other.wait()

    assert claims.share == mine.count
    # What the dead left is gone, and only our own file is left.
    assert len(list(folder.iterdir())) == 1
    claims.leave()
    claims.leave()
    assert not list(folder.iterdir())


def test_what_a_dead_worker_had_forked_holds_none_of_its_cores(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims")
    command = [sys.executable, "-c", HELD, str(tmp_path / "claims"), "fork"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout
        said = {worker.stdout.readline().strip() for _ in range(3)}
        (child,) = said - {"entered"}
        assert claims.share == share(usable(), [usable()])

        worker.kill()
        worker.wait()

        assert claims.share == usable().count
        os.kill(int(child), signal.SIGKILL)


def test_a_claim_that_cannot_be_read_counts_and_one_that_nobody_holds_does_not(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    folder = tmp_path / "claims"
    (held,) = folder.iterdir()
    held.write_text("not json")
    (folder / "dead").write_text("{}")

    assert Claims(folder).share == share(usable(), [usable()])
    assert list(folder.iterdir()) == [held]


@pytest.mark.parametrize("kind", ["writable by others", "a link", "a file"])
def test_a_folder_that_others_may_write_is_not_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, elsewhere = tmp_path / "claims", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "a link":
        folder.symlink_to(elsewhere)
    elif kind == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)

    claims = Claims(folder)
    claims.enter()

    assert claims.share == usable().count
    assert "other workers of this host will not count this one's threads" in caplog.text
    assert not list(elsewhere.iterdir())
    assert kind == "a file" or not list(folder.iterdir())
