"""A supervisor in the test's own process, for what it says and counts; its workers are processes as always."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
from e2e.sites import Site
from support import eventually

from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.keys import DEFAULT_PREFIX
from millstream.worker.supervision.child_args import ChildArgs, Hosted
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.progress import Progress
from millstream.worker.supervision.supervisor import Supervisor

START_S = 90.0


class Supervision(threading.Thread):
    """A supervisor that runs in a thread; `refused` is what it raised."""

    def __init__(self, url: str, plans: Sequence[Plan], drain_s: float) -> None:
        super().__init__(name="supervision")
        self.supervisor = Supervisor(url, DEFAULT_PREFIX, plans, drain_s=drain_s)
        self.refused: ModelUnavailable | None = None

    def run(self) -> None:
        try:
            self.supervisor.run()
        except ModelUnavailable as error:
            self.refused = error

    @property
    def pids(self) -> list[int]:
        return self.supervisor.pids

    def ready(self, workers: int) -> None:
        eventually(lambda: self.supervisor.ready == workers, within_s=START_S)

    def end(self) -> None:
        """Drain, and wait for it."""
        self.supervisor.stop()
        self.join()


@contextmanager
def supervising(url: str, *plans: Plan, drain_s: float = 20.0) -> Iterator[Supervision]:
    supervision = Supervision(url, plans, drain_s)
    supervision.start()
    try:
        yield supervision
    finally:
        supervision.end()


def said(caplog: pytest.LogCaptureFixture, text: str, level: int = logging.WARNING) -> Callable[[], list[str]]:
    """Asks for the supervisor's messages of `level` that hold `text`."""

    def messages() -> list[str]:
        found = [record for record in caplog.records if record.name == "millstream.worker.supervision.supervisor"]
        return [record.message for record in found if record.levelno == level and text in record.message]

    return messages


def lone_worker(site: Site) -> tuple[int, str]:
    """Run a worker of the site's service that is expected to end by itself: its exit status and its last words."""
    progress = Progress.create()
    child_args = ChildArgs([Hosted(site.spec.name, progress.fd)], DEFAULT_PREFIX, "lone", None, 1)
    command = [sys.executable, "-P", "-m", "millstream.worker.process", child_args.to_json()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=[progress.fd], env={**os.environ, URL_VARIABLE: site.url}
    ) as process:
        try:
            status = process.wait(START_S)
        finally:
            process.kill()
    reason = progress.reason
    progress.close()
    return status, reason


def beaten(site: Site, times: int) -> None:
    """Wait until every worker of the site has beaten so often."""
    for _ in range(times):
        eventually(partial(_beaten_since, site, site.watch.counted("beat")))


def _beaten_since(site: Site, before: Mapping[str, int]) -> bool:
    return all(beat > before.get(name, 0) for name, beat in site.watch.counted("beat").items())
