"""Hosts to kill: each a supervisor in a process of its own, with the worker processes under it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from support import eventually

COMMAND = Path(sys.executable).parent / "millstream"

WORKER_RUN = (str(COMMAND), "worker", "run")

_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}


class Host:
    """`millstream worker run` on `cores`, in an empty directory and with nothing to go by but MILLSTREAM_REDIS_URL.

    `program` is another one with the same arguments.
    """

    def __init__(
        self,
        url: str,
        service: str,
        count: int,
        home: Path,
        cores: Collection[int] | None = None,
        program: Sequence[str] = WORKER_RUN,
    ) -> None:
        home.mkdir()
        self.program = program
        self._log = home / "stderr"
        with self._log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*program, service, "--count", str(count)],
                cwd=home,
                env={**_ENVIRONMENT, "MILLSTREAM_REDIS_URL": url, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                # A process group of its own, as a shell gives it: Ctrl-C can be sent as the terminal sends it.
                process_group=0,
            )
        if cores:
            os.sched_setaffinity(self.pid, cores)
        self._seen: set[int] = set()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def children(self) -> list[int]:
        """The pids of its worker processes."""
        with suppress(OSError):
            found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self._seen.update(map(int, found))
            return [int(pid) for pid in found]
        return []

    @property
    def log(self) -> str:
        """What supervisor and workers said so far."""
        return self._log.read_text(errors="replace")

    def rows_run(self) -> int:
        """Rows that its workers ran in all, by what each says when it has drained."""
        return sum(int(rows) for rows in re.findall(r": drained after \d+ jobs: (\d+) rows", self.log))

    def deaths(self) -> int:
        """How often a worker died instead of draining."""
        return len(re.findall(r"worker \S+ (?:was killed by|exited with status)", self.log))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground process group."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """kill -9 of the supervisor alone."""
        _ = self.children
        self.process.kill()
        self.process.wait()

    def lose(self) -> None:
        """The host is gone: kill -9 of the supervisor and its workers, none of which can react to another's end."""
        pids = [self.pid, *self.children]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout: float) -> int:
        """The exit status, once it ended."""
        return self.process.wait(timeout)

    def clean_up(self) -> None:
        """End what is left of it, also where a test failed half-way."""
        _ = self.children
        if self.process.poll() is None:
            self.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(15.0)
        if self.process.poll() is None:
            self.kill()
        for pid in self._seen:
            if is_worker(pid):
                os.kill(pid, signal.SIGKILL)


def is_worker(pid: int) -> bool:
    """Whether `pid` is (still) one of our worker processes, and not a zombie."""
    try:
        return b"millstream.worker.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def gone(pids: Sequence[int], *, within_s: float) -> None:
    """Wait until none of these workers runs."""
    eventually(lambda: not any(is_worker(pid) for pid in pids), within_s=within_s)
