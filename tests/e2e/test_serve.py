"""The command `millstream serve`, from its first line to its end, with one process and with several."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2e.cli_support import Background, Shell
from support import eventually
from workers import remove, spec, working

from millstream.broker.server.embedded import EmbeddedServer

SERVICE = "test-http"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, server: EmbeddedServer) -> Iterator[Shell]:
    """Commands on a server with a service that echoes."""
    with working(server.url, spec(SERVICE)):
        yield Shell(tmp_path_factory.mktemp("serve"), server.url)
    remove(server.url, SERVICE)


def url_of(command: Background) -> str:
    command.says("serving: http://")
    found = re.search(r"http://\S+", command.out)
    assert found
    return found[0]


def call(url: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/services/{SERVICE}", json={"input": "a mill"}, headers=headers, timeout=30.0)


def children(pid: int) -> set[int]:
    """The processes that serve: those of `pid` that have a client of the queue."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(each) for each in found if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()}


def test_the_command_serves_without_torch_until_it_is_interrupted(shell: Shell) -> None:
    with shell.background("serve", "--port", "0") as serving:
        answer = call(url_of(serving))
        maps = Path(f"/proc/{serving.process.pid}/maps").read_text()
        serving.interrupt()
        eventually(lambda: serving.process.poll() is not None)

    assert answer.json()["output"] == "a mill"
    assert "/torch/" not in maps
    assert (serving.process.returncode, serving.err) == (0, "")


def test_processes_share_a_port_and_one_that_is_killed_is_replaced(shell: Shell) -> None:
    with shell.background("serve", "--port", "0", "--processes", "2") as serving:
        url = url_of(serving)
        eventually(lambda: len(children(serving.process.pid)) == 2 and answers(url), within_s=30.0)
        first = children(serving.process.pid)
        os.kill(min(first), signal.SIGKILL)
        eventually(lambda: len(children(serving.process.pid) - first) == 1, within_s=30.0)
        eventually(lambda: answers(url))
        serving.process.send_signal(signal.SIGTERM)
        eventually(lambda: serving.process.poll() is not None, within_s=30.0)

    assert serving.process.returncode == 0
    assert "Traceback" not in serving.err


def answers(url: str) -> bool:
    try:
        return call(url).status_code == 200
    except httpx.TransportError:
        # It was on a connection to the process that was killed.
        return False


def test_a_key_of_the_command_line_is_accepted_until_it_is_revoked(shell: Shell) -> None:
    made = shell.run("key", "add", "mine", "--service", SERVICE)
    header = f"Bearer {made.out.decode().strip()}"
    with shell.background("serve", "--port", "0", "--keys", "keys.jsonl") as serving:
        url = url_of(serving)
        statuses = [call(url).status_code, call(url, Authorization=header).status_code]
        revoked = shell.run("key", "revoke", "mine")
        eventually(lambda: call(url, Authorization=header).status_code == 401)
        serving.interrupt()
        eventually(lambda: serving.process.poll() is not None)

    assert statuses == [401, 200]
    assert (made.code, revoked.code, revoked.out) == (0, 0, b"mine is revoked\n")
