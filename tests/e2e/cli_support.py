"""Running the installed `millstream` command: to its end, or in the background until it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest
from support import eventually

COMMAND = Path(sys.executable).parent / "millstream"
LIMIT_S = 15.0
"""The longest a command may take to say what is wrong."""

LONG = bool(os.environ.get("MILLSTREAM_LONG"))


def some(*commands: list[str]) -> pytest.MarkDecorator:
    """The test for the first and the last of `commands`; for all of them with MILLSTREAM_LONG=1.

    Each start of the command takes half a second.
    """
    return pytest.mark.parametrize("words", commands if LONG else [commands[0], commands[-1]], ids=" ".join)


def environment(home: Path, url: str | None = None) -> Mapping[str, str]:
    """Nothing of the developer's own: no URL but `url`, no server of a local `up`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}
    given = {"MILLSTREAM_REDIS_URL": url} if url else {}
    return {**ours, **given, "XDG_DATA_HOME": str(home), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Ended:
    """A command that ran to its end."""

    code: int
    out: bytes
    err: str
    seconds: float

    def line(self, code: int) -> str:
        """The one line with which it failed, soon and with `code`."""
        assert "Traceback" not in self.err
        assert (self.code, self.out, len(self.err.splitlines())) == (code, b"", 1), self
        assert self.seconds < LIMIT_S
        return self.err


@dataclass(frozen=True)
class Shell:
    """Where commands run: a directory, and the URL in their environment."""

    home: Path
    url: str | None = None

    def run(self, *words: str, stdin: bytes = b"") -> Ended:
        began = time.monotonic()
        done = subprocess.run(
            [COMMAND, *words],
            cwd=self.home,
            env=environment(self.home, self.url),
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr.decode(), time.monotonic() - began)

    def background(self, *words: str) -> Background:
        return Background(self, words)


class Background:
    """A command that runs until it is interrupted; its children are killed by pid where a test leaves them behind."""

    def __init__(self, shell: Shell, words: tuple[str, ...]) -> None:
        self._out, self._err = shell.home / "out", shell.home / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [COMMAND, *words],
                cwd=shell.home,
                env=environment(shell.home, shell.url),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
            )
        self._children: dict[int, bytes] = {}

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def says(self, text: str, *, within_s: float = 90.0) -> None:
        """Wait until `text` is on its standard output, or fail where it ends before."""
        eventually(lambda: text in self.out or self.process.poll() is not None, within_s=within_s)
        assert text in self.out, self.out + self.err

    def children(self) -> dict[int, bytes]:
        """Its worker processes and its server: pid -> command line."""
        with suppress(OSError):
            pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            self._children.update({int(pid): command_line(int(pid)) for pid in pids})
        return self._children

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def left(self) -> list[int]:
        """Which of the children it ever had still run."""
        return [pid for pid, line in self._children.items() if line and command_line(pid) == line]

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.children()
        self.process.kill()
        self.process.wait()
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def command_line(pid: int) -> bytes:
    """Empty where there is no such process, or only what is left for its parent to read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
