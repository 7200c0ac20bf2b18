"""`transformers serve` in a process of its own, on one port: started, killed, and started again.

It needs packages that the product does not: an environment that has transformers[serving], torch, accelerate and
psutil. MILLSTREAM_SERVE_PYTHON names its Python. Otherwise a new environment is made, which takes about a minute: it
uses the packages of this one, and pip installs what they lack.
"""

from __future__ import annotations

import os
import signal
import site
import socket
import subprocess
import time
import urllib.error
import urllib.request
import venv
from importlib.metadata import version
from pathlib import Path

START_S = 120.0
"""Seconds that a server may take until it answers."""


def serving_python(folder: Path) -> Path:
    """The interpreter of an environment that can run `transformers serve`. A new one is made in `folder`."""
    if given := os.environ.get("MILLSTREAM_SERVE_PYTHON"):
        return Path(given)
    venv.create(folder, with_pip=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "here.pth").write_text(f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n")
    python = folder / "bin" / "python"
    wanted = [f"transformers[serving]=={version('transformers')}", f"torch=={version('torch')}", "accelerate", "psutil"]
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *wanted], check=True)
    return python


class TransformersServer:
    """One server of the model in `model`, which is also the model's name in requests. `starts`: number of starts."""

    def __init__(self, python: Path, model: str, log: Path) -> None:
        self.model = model
        self.starts = 0
        self._python = python
        self._log = log
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self._port = int(found.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://localhost:{self._port}/v1"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        assert self._process is None
        words = ["-m", "transformers.cli.transformers", "serve", self.model, "--device", "cpu"]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        # Its output goes to a file: a pipe that nobody reads would stop it.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._python, *words, "--port", str(self._port)],
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )
        self.starts += 1
        ends = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()[-2_000:]
            assert time.monotonic() < ends, f"no answer within {START_S:g} s"
            time.sleep(0.2)

    def kill(self) -> None:
        """Ends it by SIGKILL, amid its requests."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ends it by SIGTERM, as for an update; by SIGKILL if it takes longer than 10 s."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(10.0)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://localhost:{self._port}/health", timeout=2.0) as response:
                return bool(response.status == 200)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
