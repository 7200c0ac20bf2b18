"""A checkout of the product at work: its own `millstream up` with one worker, and a process that calls it.

Nothing here depends on the product's code: both are processes of the checkout's own interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click
from bench_embed import MODEL
from corpus import mix
from driver import Order
from measure import children, cpu_s
from stage import HERE, START_S, Driver, until

Kind = Literal["echo", "minilm"]

LENGTH = 200
WARM_S = 0.5
LEAST_TEXTS, MOST_TEXTS = 128, 800

CONFIG: Mapping[Kind, str] = {
    "echo": """\
models: {m: {type: echo, model_name: "vector:384"}}
services: {bench: {model: m, runtime: {worker_count: 1}}}
""",
    "minilm": f"""\
models: {{m: {{type: embedding, model_name: "{MODEL}", device: cpu}}}}
services: {{bench: {{model: m, runtime: {{batch_size: 64, worker_count: 1, truncate: end}}}}}}
""",
}
SERVICE = "bench"
_URL = re.compile(r"^use: +export MILLSTREAM_REDIS_URL=(\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Checkout:
    """A folder with the product and its .venv."""

    path: Path

    def command(self, name: str) -> str:
        return str(self.path / ".venv" / "bin" / name)

    def described(self) -> str:
        """Its commit. Raises click.UsageError if its interpreter imports another checkout's code."""
        found = self._ask(self.command("python"), "-c", "import millstream.client as c; print(c.__file__)")
        if not Path(found).resolve().is_relative_to(self.path.resolve()):
            raise click.UsageError(f"{self.command('python')} imports {found}: run scripts/setup dev in {self.path}")
        return f"{self.path}, {self._ask('git', '-C', str(self.path), 'log', '-1', '--format=%h %s')}"

    def _ask(self, *command: str) -> str:
        done = subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.UsageError(f"{self.path}: {done.stderr.strip()[-500:]}")
        return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Mill:
    """A checkout at work: `millstream up` with one worker, and a process that calls it."""

    checkout: Checkout
    url: str
    up: subprocess.Popen[bytes]
    driver: Driver
    texts: Sequence[str] = ()

    def warmed_up(self, kind: Kind, seconds: float) -> Mill:
        """After a run that does not count. `texts` are as many as it could embed in twice `seconds`."""
        warm = mix(MOST_TEXTS)[:LEAST_TEXTS]
        order = Order("threads", 64, WARM_S, LENGTH) if kind == "echo" else Order("texts", texts=warm)
        count = round(2 * seconds * self.driver.run(order).rate)
        return replace(self, texts=mix(MOST_TEXTS)[: max(LEAST_TEXTS, count)])

    @property
    def workers(self) -> Sequence[int]:
        return [pid for pid in children(self.up.pid) if b"millstream.worker.process" in _command_line(pid)]

    @property
    def servers(self) -> Sequence[int]:
        return [pid for pid in children(self.up.pid) if b"-server" in _command_line(pid)]

    def worker_cpu_s(self) -> float:
        return cpu_s(self.workers)

    def queue(self, verb: str) -> None:
        """`millstream queue pause` or `resume`."""
        command = [self.checkout.command("millstream"), "queue", verb, SERVICE]
        subprocess.run(command, cwd="/", env=environment(self.url), stdout=subprocess.DEVNULL, check=True)


@contextmanager
def working(checkout: Checkout, kind: Kind) -> Iterator[Mill]:
    """Start `checkout` with one ready worker; everything ends with the block."""
    with tempfile.TemporaryDirectory(prefix="paired-") as folder, ExitStack() as ends:
        home = Path(folder)
        (home / "config.yaml").write_text(CONFIG[kind], encoding="utf-8")
        with (home / "out").open("wb") as out:
            command = [checkout.command("millstream"), "up", "config.yaml", "--data-dir", str(home / "data")]
            up = subprocess.Popen(
                command, cwd=home, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        ends.callback(_end, up)
        url = _await_ready(up, home / "out")
        process = subprocess.Popen(
            [checkout.command("python"), str(HERE / "driver.py"), "client", url, SERVICE],
            cwd=home,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ends.callback(_kill, process)
        yield Mill(checkout, url, up, Driver(process))


def environment(url: str | None = None) -> dict[str, str]:
    """Nothing that would lead to another checkout's code or server; torch's threads do not spin while they wait."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MILLSTREAM_", "PYTHON"))}
    given = {"MILLSTREAM_REDIS_URL": url} if url else {}
    return {**ours, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **given}


def _await_ready(up: subprocess.Popen[bytes], out: Path) -> str:
    """The server's URL, once the worker is ready."""
    until(lambda: "ready: " in _said(out) or up.poll() is not None, within_s=START_S)
    found = _URL.search(_said(out))
    if up.poll() is not None or not found:
        raise RuntimeError(f"`millstream up` did not start: {_said(out)[-2_000:]}")
    return found[1]


def _said(out: Path) -> str:
    return out.read_text(errors="replace")


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
