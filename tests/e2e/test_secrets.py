"""A password is shown nowhere: not in what is printed or logged, not in `ps`, not in Redis; from a file, not even in
a process's environment."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import engines
import pytest
import redis
from e2e.cli_support import COMMAND, environment
from support import eventually

from millstream.client import Client

pytestmark = pytest.mark.early

SECRET = "s3cr3t-0f-redis"
WRONG = "wr0ng-0f-redis"
LONG_S = 60.0

CONFIG = """\
models: {{m: {{type: echo}}}}
services: {{mill: {{model: m, runtime: {{worker_count: 2}}}}}}
redis: {{{redis}}}
"""


@dataclass(frozen=True)
class Stack:
    """A server with a password, and how commands in `home` are told it."""

    home: Path
    server: redis.Redis
    url: str
    environ: Mapping[str, str]

    def run(self, *words: str) -> str:
        """All that a command prints, under MILLSTREAM_DEBUG."""
        done = subprocess.run(
            [COMMAND, *words], cwd=self.home, env=self.environ, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr


@pytest.fixture(params=["file", "url"])
def way(request: pytest.FixtureRequest) -> str:
    """Where the password is: in a file that config.yaml names, or in MILLSTREAM_REDIS_URL."""
    return str(request.param)


@pytest.fixture
def stack(tmp_path: Path, way: str) -> Iterator[Stack]:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    with engines.serving(engines.binary_of("valkey9"), tmp_path) as port:
        server = redis.Redis(port=port, protocol=2)
        server.acl_setuser("default", enabled=True, reset_passwords=True, passwords=[f"+{SECRET}"])
        plain, full = f"redis://127.0.0.1:{port}", f"redis://:{SECRET}@127.0.0.1:{port}"
        named = f"url: '{plain}', password_file: '{file}'" if way == "file" else ""
        (tmp_path / "config.yaml").write_text(CONFIG.format(redis=named))
        environ = {**environment(tmp_path, None if way == "file" else full), "MILLSTREAM_DEBUG": "1"}
        url = f"{plain}?password_file={file}" if way == "file" else full
        yield Stack(tmp_path, redis.Redis.from_url(full, protocol=2), url, environ)


@contextmanager
def up(stack: Stack) -> Iterator[subprocess.Popen[bytes]]:
    with (stack.home / "log").open("wb") as log:
        process = subprocess.Popen(
            [COMMAND, "up"], cwd=stack.home, env=stack.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        eventually(lambda: "ready: " in said(stack) or process.poll() is not None, within_s=LONG_S)
        assert process.poll() is None, said(stack)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LONG_S)


def said(stack: Stack) -> str:
    return (stack.home / "log").read_text()


def children(pid: int) -> list[int]:
    direct = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [below for each in direct for below in children(each)]


def stored(server: redis.Redis) -> str:
    """What lies in Redis."""
    reads: dict[bytes, Callable[[bytes], object]] = {
        b"hash": server.hgetall,
        b"set": server.smembers,
        b"stream": server.xrange,
        b"string": server.get,
    }
    keys = list(server.scan_iter())
    return str([(key, reads[kind](key)) for key in keys if (kind := server.type(key)) in reads])


def test_a_password_is_shown_nowhere(stack: Stack, way: str) -> None:
    with up(stack) as process, Client(stack.url, prefix="ms") as client:
        assert client.submit("mill", ["a"]).result(timeout=LONG_S) == ["a"]
        workers = children(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        eventually(lambda: "was killed by SIGKILL" in said(stack))
        everything = {
            "ps": str([Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [process.pid, *workers[1:]]]),
            "redis": stored(stack.server),
            "client": repr(client._calls.connection) + repr(client._calls.connection.client),
        }
        if way == "file":
            everything["environment"] = str(
                [Path(f"/proc/{pid}/environ").read_bytes() for pid in [process.pid, *workers[1:]]]
            )
        for words in (
            ["queue", "ls"],
            ["worker", "ls", "--json"],
            ["config", "show", "--origin"],
            ["queue", "peek", "mill"],
        ):
            everything[" ".join(words)] = stack.run(*words)
    everything["up"] = said(stack)

    assert "mill" in everything["redis"]
    assert "mill" in everything["queue ls"]
    assert len(workers) == 2
    assert [where for where, text in everything.items() if SECRET in text] == []


def test_a_wrong_password_is_refused_and_shown_as_little(stack: Stack, way: str) -> None:
    if way == "file":
        (stack.home / "secret").write_text(WRONG)
        failed = stack
    else:
        environ = {name: value.replace(SECRET, WRONG) for name, value in stack.environ.items()}
        failed = Stack(stack.home, stack.server, stack.url, environ)

    for words in (["up"], ["queue", "ls"], ["config", "push"], ["worker", "run"]):
        text = failed.run(*words)

        assert "Traceback" in text
        assert "refuses this user" in text
        assert SECRET not in text
        assert WRONG not in text
