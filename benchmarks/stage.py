"""What is measured, set up: a server of its own, worker processes, processes that make load. All ended by pid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Literal

from driver import Order, Result
from measure import children

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.inspector import Inspector, WorkerView
from millstream.broker.queue.registry import Registry
from millstream.broker.server.datadir import AppendFsync
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.server.engine import version_text
from millstream.broker.transport.connection import Connection

HERE = Path(__file__).parent
START_S = 180.0
_POLL_S = 0.005


def until(condition: Callable[[], object], *, within_s: float = START_S) -> None:
    """Wait until `condition()` is true. Raises TimeoutError."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {condition}")
        time.sleep(_POLL_S)


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Meanwhile another process computes, if that is wanted."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def echo(name: str, habits: str = "", **runtime: object) -> ServiceSpec:
    model = ModelSpec(type="echo", model_name=habits)
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime.model_validate(runtime))


@dataclass(frozen=True)
class Driver:
    """A process that makes load: see driver.py."""

    process: subprocess.Popen[str]

    def begin(self, order: Order) -> None:
        pipe = self._pipe(self.process.stdin)
        pipe.write(json.dumps(asdict(order)) + "\n")
        pipe.flush()

    def end(self) -> Result:
        line = self._pipe(self.process.stdout).readline()
        if not line:
            raise RuntimeError(f"a process that makes load ended: status {self.process.wait()}")
        return Result(**json.loads(line))

    def run(self, order: Order) -> Result:
        self.begin(order)
        return self.end()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        if pipe is None:
            raise RuntimeError("no pipe")
        return pipe


@dataclass(frozen=True)
class Team:
    """The workers of one `millstream worker run`, with the process that supervises them."""

    process: subprocess.Popen[bytes]

    @property
    def workers(self) -> list[int]:
        return children(self.process.pid)

    @property
    def pids(self) -> list[int]:
        return [self.process.pid, *self.workers]

    def stop(self) -> None:
        """Drain, as Ctrl-C does."""
        _drain(self.process)


class Stage:
    """One server, and what was started against it; everything ends with `ends`."""

    def __init__(self, home: Path, ends: ExitStack, appendfsync: AppendFsync = "everysec") -> None:
        self.home = home
        self._ends = ends
        # As the product starts it: AOF, everysec, on a Unix socket.
        self.server = ends.enter_context(EmbeddedServer.start(home / "data", appendfsync=appendfsync))
        self.url = self.server.url
        self.connection = Connection(self.url, name="bench")
        ends.callback(self.connection.close)

    @property
    def version(self) -> str:
        return f"{self.server.engine} {version_text(self.server.version)} (AOF everysec, Unix socket)"

    @property
    def log(self) -> str:
        """Messages of all supervisors and workers so far."""
        return (self.home / "workers.log").read_text(errors="replace")

    def keys(self, spec: ServiceSpec) -> ServiceKeys:
        return ServiceKeys(spec.name)

    def register(self, spec: ServiceSpec) -> None:
        Registry(self.connection).push([spec])

    def workers(self, spec: ServiceSpec, count: int, folder: Path | None = None) -> Team:
        """Start `count` more workers of `spec`, and wait until they are ready.

        `folder` is the one they run in; a config.yaml there names the code of a custom service.
        """
        self.register(spec)
        wanted = len(self.live(spec)) + count
        process = self._worker_run([spec.name, "--count", str(count)], folder or self.home)
        until(lambda: process.poll() is not None or len(self.live(spec)) >= wanted)
        if process.poll() is not None:
            raise RuntimeError(f"workers of {spec.name} ended: {self.log[-2_000:]}")
        return Team(process)

    def pool(self, name: str, folder: Path) -> Team:
        """Start the processes of a pool of the config.yaml in `folder`. Its services must be registered."""
        return Team(self._worker_run(["--pool", name], folder))

    def _worker_run(self, words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "millstream.cli.main", "worker", "run", *words]
        with (self.home / "workers.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._ends.callback(_drain, process)
        return process

    def live(self, spec: ServiceSpec) -> Sequence[WorkerView]:
        """The workers, as each said at its last beat."""
        return [
            each for each in Inspector(self.connection).services([spec.name])[0].workers if each.state != "starting"
        ]

    def driver(self, kind: Literal["client", "raw"], service: str = "-") -> Driver:
        command = [sys.executable, str(HERE / "driver.py"), kind, self.url, service]
        process = subprocess.Popen(
            command, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ends.callback(_end, process)
        return Driver(process)

    def python(
        self,
        file: str,
        *words: str,
        environ: Mapping[str, str] = MappingProxyType({}),
        interpreter: str = sys.executable,
    ) -> subprocess.Popen[str]:
        """A process of benchmarks/, such as the raw worker, with `environ` beside the usual environment."""
        process = subprocess.Popen(
            [interpreter, str(HERE / file), *words],
            env={**self.environment(), **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ends.callback(_end, process)
        return process

    def environment(self) -> dict[str, str]:
        """Environment of all processes: this server, and nothing of the developer's own settings."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}
        return {**ours, "MILLSTREAM_REDIS_URL": self.url, "HF_HUB_OFFLINE": "1"}


def _drain(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(40.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def staged(appendfsync: AppendFsync = "everysec") -> Iterator[Stage]:
    """A stage in a temporary folder. With "always" a server that is killed has all that it acknowledged."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as ends:
        yield Stage(Path(folder), ends, appendfsync)
