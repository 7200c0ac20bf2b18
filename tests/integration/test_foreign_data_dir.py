"""A data dir that others may have written: nothing in it is run, read or written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.cli_support import Shell

from millstream.broker.contract.errors import ConfigError
from millstream.broker.server import ownership
from millstream.broker.server.embedded import EmbeddedServer, running
from millstream.broker.transport.connection import find_url

NOBODY = 65534
Disown = Callable[[Path], None]


@pytest.fixture
def disown(monkeypatch: pytest.MonkeyPatch) -> Disown:
    """Gives a path to another user; where only root may, the check is told so."""
    given: set[tuple[int, int]] = set()

    def owner(found: os.stat_result) -> int:
        return NOBODY if (found.st_dev, found.st_ino) in given else found.st_uid

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, NOBODY, -1, follow_symlinks=False)
        else:
            found = path.lstat()
            given.add((found.st_dev, found.st_ino))
            monkeypatch.setattr(ownership, "_owner", owner)

    return give


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A program that leaves a trace if it is run."""
    program = tmp_path / "planted-server"
    program.write_text(
        f"#!/bin/sh\ntouch {tmp_path / 'ran'}\necho 'Valkey server v=9.9.9 sha=0:0 malloc=libc bits=64'\n"
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def data_dir(tmp_path: Path, wheel_binary: Path) -> Path:
    """One that was used before."""
    with EmbeddedServer.start(tmp_path / "data", binary=wheel_binary):
        pass
    return tmp_path / "data"


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """Somebody's folder, which must stay as it is."""
    folder = Path(tempfile.mkdtemp())
    (folder / "precious").write_text("precious")
    yield folder
    shutil.rmtree(folder)


def refused(data_dir: Path, reason: str) -> str:
    """The error of every way into `data_dir`, which leaves no trace there."""
    before = {path: path.lstat() for path in [data_dir, *data_dir.rglob("*")]}
    environ = {"MILLSTREAM_DATA_DIR": str(data_dir)}
    with pytest.raises(ConfigError, match=reason) as caught:
        EmbeddedServer.start(data_dir)
    with pytest.raises(ConfigError, match=reason):
        running(data_dir)
    with pytest.raises(ConfigError, match=reason):
        find_url(None, None, environ)
    assert {path: path.lstat() for path in [data_dir, *data_dir.rglob("*")]} == before
    assert "MILLSTREAM_DATA_DIR" in caught.value.hint
    return str(caught.value)


def test_a_folder_of_another_user_is_refused(data_dir: Path, disown: Disown) -> None:
    disown(data_dir)

    assert f"belongs to user {NOBODY}" in refused(data_dir, "data dir .* is not used")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused_with_the_fix(data_dir: Path, mode: int) -> None:
    data_dir.chmod(mode)

    assert f"chmod go-w {data_dir}" in refused(data_dir, "it may be written by others")
    data_dir.chmod(0o755)
    assert running(data_dir) is None


def test_a_folder_below_one_that_everybody_may_write_is_refused(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "open").mkdir()
    data_dir.rename(tmp_path / "open" / "data")
    (tmp_path / "open").chmod(0o777)

    refused(tmp_path / "open" / "data", "above it, may be written by everybody")
    (tmp_path / "open").chmod(0o1777)
    assert running(tmp_path / "open" / "data") is None


@pytest.mark.parametrize("name", ["engine.json", "lock", "server.log", "appendonlydir", "appendonlydir/planted.aof"])
def test_a_file_of_another_user_is_refused(data_dir: Path, disown: Disown, name: str) -> None:
    (data_dir / name).touch()
    disown(data_dir / name)

    refused(data_dir, f"{name.rpartition('/')[2]} belongs to user {NOBODY}")


@pytest.mark.parametrize("name", ["engine.json", "engine.new", "lock", "server.log", "appendonlydir/planted.aof"])
def test_a_link_in_the_place_of_a_file_is_refused_and_its_target_stays(
    data_dir: Path, elsewhere: Path, name: str
) -> None:
    (data_dir / name).unlink(missing_ok=True)
    (data_dir / name).symlink_to(elsewhere / "precious")

    refused(data_dir, "is a link")
    assert (elsewhere / "precious").read_text() == "precious"


def test_a_link_of_another_user_to_a_folder_of_ours_is_refused(tmp_path: Path, elsewhere: Path, disown: Disown) -> None:
    link = tmp_path / "data"
    link.symlink_to(elsewhere)
    disown(link)

    with pytest.raises(ConfigError, match=f"is a link of user {NOBODY}"):
        EmbeddedServer.start(link)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_a_link_of_ones_own_is_followed(tmp_path: Path, data_dir: Path, wheel_binary: Path) -> None:
    (tmp_path / "link").symlink_to(data_dir)

    with EmbeddedServer.start(tmp_path / "link", binary=wheel_binary) as server:
        assert server.data_dir == data_dir


def test_a_file_that_others_may_write_counts_only_if_they_can_reach_it(data_dir: Path) -> None:
    (data_dir / "engine.json").chmod(0o666)
    assert running(data_dir) is None

    data_dir.chmod(0o755)
    refused(data_dir, "engine.json in it may be written by others")


@pytest.mark.parametrize("written", ["by another user", "by us"])
def test_a_program_that_the_record_names_is_not_run(
    tmp_path: Path, data_dir: Path, planted: Path, disown: Disown, written: str
) -> None:
    record = json.loads((data_dir / "engine.json").read_text())
    (data_dir / "engine.json").write_text(json.dumps(record | {"binary": str(planted)}))
    if written == "by another user":
        disown(data_dir / "engine.json")
        refused(data_dir, "engine.json belongs to")
    else:
        with EmbeddedServer.start(data_dir) as server:
            assert server.alive()
            assert json.loads((data_dir / "engine.json").read_text())["binary"] != str(planted)

    assert not (tmp_path / "ran").exists()


def test_a_socket_that_a_foreign_record_names_is_not_called(tmp_path: Path, data_dir: Path, disown: Disown) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as trap:
        trap.bind(f"{short}/s")
        trap.listen()
        trap.setblocking(False)
        record = json.loads((data_dir / "engine.json").read_text())
        (data_dir / "engine.json").write_text(json.dumps(record | {"socket": f"{short}/s"}))
        disown(data_dir / "engine.json")

        refused(data_dir, "engine.json belongs to")
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_the_command_says_it_in_one_line(tmp_path: Path, data_dir: Path) -> None:
    data_dir.chmod(0o777)
    (tmp_path / "config.yaml").write_text("models: {m: {type: echo}}\nservices: {echo: {model: m}}\n")
    shell = Shell(tmp_path)

    for words in (("up", "--data-dir", str(data_dir)),):
        assert "may be written by others" in shell.run(*words).line(3)


def test_what_a_server_leaves_behind_is_its_users_alone(data_dir: Path, wheel_binary: Path) -> None:
    before = os.umask(0o000)
    try:
        with EmbeddedServer.start(data_dir, binary=wheel_binary):
            pass
    finally:
        os.umask(before)

    modes = {path.name: path.stat().st_mode & 0o077 for path in data_dir.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0}, modes
