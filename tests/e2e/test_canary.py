"""`millstream up` and `worker run` drive canaries; when the one that drives is killed, another goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from e2e.cli_support import Shell
from support import eventually
from workers import LONG_S, remove

from millstream.client import Client

CONFIG = """\
models:
  good: {{type: custom, handler: "versions:good"}}
  bad: {{type: custom, handler: "versions:bad"}}
services:
  {name}@v1: {{model: good}}
  {name}@v2: {{model: bad}}
  {name}:
    route: {{versions: {{v1: 1, v2: 0}}, fallback: v1, canary: {{to: v2, every: 2s, steps: [50, 100]}}}}
"""

CODE = """\
def good(payloads):
    return payloads

def bad(payloads):
    raise RuntimeError("broken")
"""


@contextmanager
def calling(url: str, route: str) -> Iterator[list[Exception]]:
    """Calls meanwhile, one after the other. The errors of those that failed."""
    over, failed = threading.Event(), list[Exception]()

    def call() -> None:
        with Client(url, prefix="ms") as client:
            while not over.is_set():
                try:
                    assert client.submit(route, ["a"]).result(LONG_S) == ["a"]
                except Exception as error:  # noqa: BLE001 - each is a failed call
                    failed.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        over.set()
        for thread in threads:
            thread.join(LONG_S)


def test_a_canary_goes_on_when_its_supervisor_is_killed_and_a_bad_version_fails_no_call(
    url: str, tmp_path: Path
) -> None:
    name, shells = f"test-{uuid.uuid4().hex[:8]}", [Shell(tmp_path / host, url) for host in ("one", "two")]
    for shell in shells:
        shell.home.mkdir()
        (shell.home / "config.yaml").write_text(CONFIG.format(name=name))
        (shell.home / "versions.py").write_text(CODE)

    def shown() -> dict[str, Any]:
        found = json.loads(shells[0].run("route", "show", "--json").out)
        return dict(found[0]) if found else {"versions": []}

    def canary() -> dict[str, Any]:
        return dict(shown()["canary"])

    with ExitStack() as ends:
        up = ends.enter_context(shells[0].background("up"))
        eventually(lambda: shown()["versions"], within_s=LONG_S)
        second = ends.enter_context(shells[1].background("worker", "run", f"{name}@v1", f"{name}@v2"))
        eventually(lambda: [each["workers"] for each in shown()["versions"]] == [2, 2], within_s=LONG_S)
        started = shells[0].run("route", "canary", "start", name)
        assert started.code == 0, started.err
        eventually(lambda: canary()["driver"], within_s=LONG_S)
        running = {each.process.pid: each for each in (up, second)}
        first = running[int(str(canary()["driver"]).split(":")[1])]
        os.kill(first.process.pid, signal.SIGKILL)
        with calling(url, name) as failed:
            eventually(lambda: canary()["status"] == "rolled_back", within_s=LONG_S)
        assert failed == []
        assert "100.0% of its rows failed" in str(canary()["reason"])
    for service in (f"{name}@v1", f"{name}@v2", name):
        remove(url, service)
