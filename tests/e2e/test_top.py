"""`millstream top` in a terminal: drawn in place, through the loss of its server, and the terminal as it was."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.cli_support import Shell
from e2e.sites import echo
from e2e.terminal import CTRL_C, Terminal
from support import eventually

from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection

RESTORED = "\x1b[?25h\x1b[?1049l"


@pytest.fixture
def service(url: str) -> str:
    connection = Connection(url, name="tests")
    spec = echo("")
    Registry(connection).push([spec])
    connection.close()
    return spec.name


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Shell:
    return Shell(tmp_path, url)


def last_frame(terminal: Terminal) -> list[str]:
    """The lines of the last frame that was drawn whole: the one after it may still be on its way."""
    text = terminal.shown.split("\x1b[H")[-2].replace("\x1b[K", "").replace("\x1b[J", "")
    return text.replace("\r", "").split("\n")


@pytest.mark.parametrize(
    ("columns", "leave", "status"),
    [
        (80, lambda terminal: terminal.press(b"q"), 0),
        (160, lambda terminal: terminal.press(CTRL_C), 0),
        (40, lambda terminal: terminal.process.terminate(), 143),
    ],
    ids=["q", "Ctrl-C", "SIGTERM"],
)
def test_it_fits_the_terminal_and_leaves_it_as_it_was(
    shell: Shell, service: str, columns: int, leave: Callable[[Terminal], None], status: int
) -> None:
    with Terminal(shell, ["top", "--interval", "50ms"], term="xterm", columns=columns) as terminal:
        before = terminal.attributes
        terminal.shows(service, times=2)
        assert terminal.attributes != before
        assert [line for line in last_frame(terminal) if len(line) >= columns] == []

        leave(terminal)

        assert terminal.wait() == status
        assert terminal.attributes == before
        assert terminal.shown.endswith(RESTORED)


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(shell: Shell, service: str) -> None:
    with Terminal(shell, ["top"], term="xterm") as terminal:
        before = terminal.attributes
        terminal.shows(service)

        terminal.process.send_signal(signal.SIGTSTP)

        eventually(lambda: terminal.attributes == before and terminal.shown.endswith(RESTORED))
        terminal.process.send_signal(signal.SIGCONT)
        terminal.shows("\x1b[?1049h", times=2)
        assert terminal.attributes != before
        terminal.press(b"q")
        assert terminal.wait() == 0


def test_it_says_that_the_server_is_lost_and_goes_on_when_it_is_back(
    shell: Shell, service: str, server: EmbeddedServer
) -> None:
    with Terminal(shell, ["top", "--interval", "50ms"], term="xterm") as terminal:
        terminal.shows(service, times=2)

        os.kill(server.pid, signal.SIGKILL)

        eventually(lambda: "SERVER LOST for" in "".join(last_frame(terminal)))
        assert service in "".join(last_frame(terminal))
        server.restart()
        eventually(lambda: "LOST" not in "".join(last_frame(terminal)) and service in "".join(last_frame(terminal)))
        terminal.press(b"q")
        assert terminal.wait() == 0


def test_without_a_terminal_it_prints_once(shell: Shell, service: str) -> None:
    text = shell.run("top", service, "--interval", "10ms")
    figures = shell.run("top", service, "--interval", "10ms", "--json")

    assert (text.code, text.err, service in text.out.decode(), b"\x1b" in text.out) == (0, "", True, False)
    assert [each["name"] for each in json.loads(figures.out)["services"]] == [service]


def test_without_a_server_or_with_a_wrong_name_it_is_one_line(shell: Shell, service: str, tmp_path: Path) -> None:
    assert f"did you mean {service}" in shell.run("top", f"{service}x").line(4)
    assert "redis://127.0.0.1:1" in Shell(tmp_path, "redis://127.0.0.1:1").run("top").line(5)
