"""A server and workers of a program's own: they come with one call, and go however the program ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import pytest
from e2e.cli_support import command_line, environment
from support import eventually

from millstream.broker.contract.errors import BrokerUnavailable, ConfigError, ModelUnavailable, NoWorkers
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.server.embedded import EmbeddedServer, running
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client

GONE_S = 5.0
"""The longest that anything may outlive its program."""

STARTED_S = 60.0
ECHO = "models: {m: {type: echo}}\nservices: {mill: {model: m, runtime: {worker_count: 1}}}\n"
HANGING = ECHO.replace("type: echo", "type: echo, model_name: 'hang:long'").replace(
    "worker_count: 1", "worker_count: 2"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: its config.yaml has one service, `mill`. No server is known here but its own."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MILLSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text(ECHO)
    return tmp_path


Started = Callable[[], list[int]]


@pytest.fixture
def started() -> Started:
    """Asks for the processes that came since the test began; other tests' servers may run beside it."""
    before = set(descendants(os.getpid()))
    return lambda: [pid for pid in descendants(os.getpid()) if pid not in before]


class Program:
    """A user's own program, with all the processes that it ever started, whoever is their parent now."""

    def __init__(self, home: Path, text: str) -> None:
        # No folder with the `millstream` command is on its PATH.
        self.process = subprocess.Popen(
            [sys.executable, "-c", text],
            cwd=home,
            env={**environment(home), "PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started: dict[int, bytes] = {}

    def says(self, line: str) -> None:
        """Wait for its next line, and note what runs then."""
        assert self.process.stdout
        said = self.process.stdout.readline()
        assert said == f"{line}\n", f"{said!r} {self.process.stderr and self.process.stderr.read()}"
        self._started = {pid: command_line(pid) for pid in descendants(self.process.pid)}

    def go_on(self) -> None:
        """Answer its `input()`."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    @property
    def workers(self) -> list[int]:
        return [pid for pid, line in self._started.items() if b"millstream.worker.process" in line]

    @property
    def servers(self) -> list[int]:
        return [pid for pid, line in self._started.items() if b"redis.sock" in line]

    def left(self) -> list[bytes]:
        return [line for pid, line in self._started.items() if line and command_line(pid) == line]

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        for pid, line in self._started.items():
            if line and command_line(pid) == line:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


LONG = bool(os.environ.get("MILLSTREAM_LONG"))

ENDINGS = {"end": ("", 0), "error": ("import no_such_module", 1), "exit": ("raise SystemExit(7)", 7)}
"""How a program can end, and its exit status."""


def view(url: str | None) -> ServiceView:
    """The service as it stands."""
    connection = Connection(url or "", name="tests")
    try:
        return Inspector(connection).services(["mill"])[0]
    finally:
        connection.close()


BUSY = """
import time
from millstream.client import Client
client = Client.local("config.yaml")
handles = [client.submit("mill", ["long"]) for _ in range(6)]
while client._calls.services.live_workers("mill") < 2:
    pass
print("up", flush=True)
time.sleep(600)
"""


def test_a_program_killed_with_9_leaves_no_process_and_keeps_its_jobs(home: Path) -> None:
    (home / "config.yaml").write_text(HANGING)

    with Program(home, BUSY) as program:
        program.says("up")
        assert (len(program.servers), len(program.workers)) == (1, 2)
        eventually(lambda: view(running(home / "millstream")).in_flight > 0)
        program.process.kill()
        eventually(lambda: not program.left(), within_s=GONE_S)

    with EmbeddedServer.start(home / "millstream") as server:
        assert (view(server.url).depth, view(server.url).in_flight) == (6, 0)


def test_a_program_started_again_right_after_it_was_killed_works(home: Path) -> None:
    with Program(home, UP) as program:
        program.says("up")
        program.process.kill()

        # Its server is just being stopped.
        with Client.local() as client:
            assert client.submit("mill", ["again"]).result(timeout=30) == ["again"]


def test_where_the_server_it_found_ended_meanwhile_it_starts_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = home / "python"
    python.write_text(f'#!/bin/sh\n[ -e tried ] || {{ touch tried; exit 5; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))

    with Client.local() as client:
        assert client.submit("mill", ["a"]).result(timeout=30) == ["a"]


UP = """
from millstream.client import Client
client = Client.local()
print("up", flush=True)
input()
"""

FORKED = """
import os, time
from millstream.client import Client
client = Client.local()
if not os.fork():
    client.close()
    print("forked", flush=True)
    time.sleep(600)
print(client.submit("mill", ["alive"]).result(timeout=30), flush=True)
time.sleep(600)
"""


def test_a_forked_child_ends_nothing_and_keeps_nothing_alive(home: Path) -> None:
    with Program(home, FORKED) as program:
        program.says("forked")
        program.says("['alive']")
        program.process.kill()
        program.process.wait(GONE_S)

        # The child, and nobody else.
        eventually(lambda: [b"-c" in line for line in program.left()] == [True], within_s=GONE_S)


@pytest.mark.parametrize(("ending", "status"), ENDINGS.values() if LONG else [ENDINGS["end"], ENDINGS["error"]])
def test_a_program_that_ends_without_closing_leaves_no_process(home: Path, ending: str, status: int) -> None:
    with Program(home, f"{UP}{ending}") as program:
        program.says("up")
        assert (len(program.servers), len(program.workers)) == (1, 1)
        program.go_on()
        assert program.process.wait(GONE_S) == status

        assert program.left() == []


def test_an_error_while_a_module_is_imported_leaves_no_process(home: Path) -> None:
    (home / "app.py").write_text(f"{UP}client.nonsense\n")

    with Program(home, "import app") as program:
        program.says("up")
        program.go_on()
        assert program.process.wait(GONE_S) == 1

        assert program.left() == []


def test_a_closed_client_has_ended_what_it_started(home: Path, started: Started) -> None:
    with Client.local(data_dir=home / "data") as client:
        answer = client.submit("mill", ["a", "b"]).result(timeout=30)
        pids = started()

    assert answer == ["a", "b"]
    assert len(pids) == 3
    assert [pid for pid in pids if command_line(pid)] == []


def test_the_async_client_has_one_too(home: Path, started: Started) -> None:
    async def program() -> object:
        async with await AsyncClient.local(data_dir=home / "data") as client:
            handle = await client.submit("mill", ["a"])
            return await handle

    assert asyncio.run(program()) == ["a"]
    assert started() == []


def test_what_up_would_refuse_is_raised_within_seconds(home: Path) -> None:
    (home / "config.yaml").write_text(ECHO.replace("type: echo", "type: embedding, model_name: ./no-such-folder"))
    began = time.monotonic()

    with pytest.raises(ModelUnavailable, match="no-such-folder"):
        Client.local()

    assert time.monotonic() - began < GONE_S
    assert not (home / "millstream").exists()


def test_a_mistake_in_the_file_is_a_config_error_with_its_line(home: Path) -> None:
    (home / "config.yaml").write_text(ECHO.replace("worker_count", "worker_cout"))

    with pytest.raises(ConfigError, match=r"config.yaml:2: .*did you mean worker_count"):
        Client.local()


def test_other_settings_on_the_server_are_a_config_error_unless_replaced(home: Path) -> None:
    Client.local().close()
    (home / "config.yaml").write_text(ECHO.replace("worker_count", "batch_size: 7, worker_count"))

    with pytest.raises(ConfigError, match=r"runtime\.batch_size is 32, here 7"):
        Client.local()
    with Client.local(replace=True) as client:
        assert client.submit("mill", ["a"]).result(timeout=30) == ["a"]


def test_a_service_whose_workers_cannot_start_is_an_error_even_beside_one_that_runs(home: Path) -> None:
    (home / "config.yaml").write_text(ECHO.replace("services: {", "services: {wheel: {model: m}, "))
    Client.local().close()
    spoil(home, "wheel")

    with pytest.raises(ModelUnavailable, match=r"wheel.* runs spoilt"):
        Client.local(timeout=STARTED_S)


def spoil(home: Path, service: str) -> None:
    """Its workers would run other weights than some that are said to run already."""
    with EmbeddedServer.start(home / "millstream") as server:
        connection = Connection(server.url, name="tests")
        connection.client.hset(ServiceKeys(service).spec(), "fingerprint", "spoilt")
        connection.close()


def test_workers_that_take_too_long_are_ended(home: Path, started: Started) -> None:
    with pytest.raises(NoWorkers, match="not ready in time"):
        Client.local(timeout=0.01)

    assert started() == []


def test_a_server_that_is_away_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_REDIS_URL", "redis://127.0.0.1:1")

    with pytest.raises(BrokerUnavailable, match=r"redis://127\.0\.0\.1:1"):
        Client.local()


def test_clients_on_one_data_dir_share_the_server_and_any_of_them_may_close_first(home: Path, started: Started) -> None:
    with ExitStack() as ends:
        first, second, third = (ends.enter_context(Client.local()) for _ in range(3))
        assert len(view(running(home / "millstream")).workers) == 3
        assert third.submit("mill", ["a"]).result(timeout=30) == ["a"]

        second.close()
        assert len(view(running(home / "millstream")).workers) == 2
        assert first.submit("mill", ["b"]).result(timeout=30) == ["b"]

        # The server was the first one's: the third one's own `up` starts it again, with its data.
        first.close()
        assert third.submit("mill", ["c"]).result(timeout=30) == ["c"]

    assert started() == []
