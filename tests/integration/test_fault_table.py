"""docs/troubleshooting.md: each fault of its table is made, is told in its words, and is healed as it says."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import engines
import pytest
from e2e.cli_support import Shell
from integration.faults import SERVICE, Mill, frozen, milling, unwritable
from support import eventually
from workers import LONG_S

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.queue.pause import pause
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection, check

pytestmark = pytest.mark.early

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENGINES = ("valkey9", "redis62")

Fault = Callable[[Mill, Path], AbstractContextManager[str]]
FAULTS: dict[str, Fault] = {}
"""Fault of the table -> what makes it, gives what was said of it, and heals it."""
SAME_FOR_ALL: set[str] = set()
"""Faults that no server takes part in: one of ENGINES is enough."""


def rows() -> Iterator[tuple[str, list[str]]]:
    """Each fault, and the sentences that tell of it."""
    for fault, says, _ in re.findall(r"^\| (.+?) \| (.+) \| (.+?) \|$", PAGE, re.MULTILINE)[1:]:
        quoted = re.findall(r"`([^`]+)`", says)
        yield fault, [each for each in quoted if each not in ("worker run", "config push") and " " in each]


def fault(name: str, *, same_for_all: bool = False) -> Callable[[Callable[[Mill, Path], Iterator[str]]], Fault]:
    def noted(make: Callable[[Mill, Path], Iterator[str]]) -> Fault:
        FAULTS[name] = contextmanager(make)
        if same_for_all:
            SAME_FOR_ALL.add(name)
        return FAULTS[name]

    return noted


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(MillstreamError) as caught:
        action()
    return str(caught.value)


def refused_call(mill: Mill) -> str:
    """What a caller hears who does not wait."""
    return refusal(lambda: mill.client.submit(SERVICE, ["refused"], wait=False).result(LONG_S))


@contextmanager
def changed(mill: Mill, name: str, bad: object, good: object) -> Iterator[None]:
    mill.connection.client.config_set(name, str(bad))
    yield
    mill.connection.client.config_set(name, str(good))


@contextmanager
def waiting(mill: Mill) -> Iterator[list[str]]:
    """A caller whose job nobody runs; afterwards the list has what it was told."""
    pause(mill.connection.client, mill.queue.keys)
    handle = mill.client.submit(SERVICE, ["lost"], timeout=6.0)
    eventually(lambda: mill.queue.depth() == 1)
    told: list[str] = []
    yield told
    told.append(refusal(lambda: handle.result(LONG_S)))


@fault("FLUSHALL")
def flushed(mill: Mill, _: Path) -> Iterator[str]:
    with waiting(mill) as told:
        mill.connection.client.flushall()
    yield told[0]


@fault("the server is restarted without its data")
def restarted_empty(mill: Mill, _: Path) -> Iterator[str]:
    with waiting(mill) as told:
        os.kill(mill.server.pid, signal.SIGKILL)
        eventually(lambda: not mill.server.alive())
        for left in mill.server.data_dir.glob("appendonly*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        mill.server.restart()
    yield told[0]


@fault("a `maxmemory-policy` that deletes keys")
def evicting(mill: Mill, _: Path) -> Iterator[str]:
    with changed(mill, "maxmemory", 1 << 30, 0), changed(mill, "maxmemory-policy", "allkeys-lru", "noeviction"):
        yield refusal(lambda: check(mill.connection))
    check(mill.connection)


@fault("its memory is full")
def full(mill: Mill, _: Path) -> Iterator[str]:
    with changed(mill, "maxmemory", 1, 0):
        yield refused_call(mill)


@fault("it is a replica")
def replica(mill: Mill, _: Path) -> Iterator[str]:
    mill.demote()
    yield refused_call(mill)
    mill.promote()


@fault("it has fewer replicas than `min-replicas-to-write`")
def lonely(mill: Mill, _: Path) -> Iterator[str]:
    with changed(mill, "min-replicas-to-write", 1, 0):
        yield refused_call(mill)


@fault("its disk is full")
def disk_full(mill: Mill, _: Path) -> Iterator[str]:
    with unwritable(mill):
        yield refused_call(mill)


@fault("it is frozen or overloaded")
def overloaded(mill: Mill, _: Path) -> Iterator[str]:
    with frozen(mill.server.pid):
        yield refusal(lambda: mill.client.submit(SERVICE, ["late"], timeout=1.0).result(LONG_S))


@fault("it is too old", same_for_all=True)
def too_old(mill: Mill, _: Path) -> Iterator[str]:
    connection = Connection(mill.server.url)
    with pytest.MonkeyPatch.context() as older:
        older.setattr(connection.client, "info", lambda section: {"redis_version": "6.0.16"})
        yield refusal(lambda: check(connection))
    connection.close()


@fault("nothing listens at the URL", same_for_all=True)
def nobody(mill: Mill, home: Path) -> Iterator[str]:
    yield Shell(home, f"redis://127.0.0.1:{engines.free_port()}").run("queue", "ls").line(5)


@fault("another program listens there", same_for_all=True)
def another(mill: Mill, home: Path) -> Iterator[str]:
    def answer(listener: socket.socket) -> None:
        link, _ = listener.accept()
        with link:
            link.recv(1024)
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            link.recv(1024)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=[listener], daemon=True).start()
        yield Shell(home, f"redis://127.0.0.1:{listener.getsockname()[1]}").run("queue", "ls").line(5)


@fault("the URL has a database that the server lacks")
def no_database(mill: Mill, home: Path) -> Iterator[str]:
    yield Shell(home, f"{mill.server.tcp_url}/99").run("queue", "ls").line(5)


@fault("the URL has an unknown scheme", same_for_all=True)
def no_scheme(mill: Mill, home: Path) -> Iterator[str]:
    yield Shell(home, "http://127.0.0.1:6379").run("queue", "ls").line(3)


@fault("the URL has a variable that nobody filled in", same_for_all=True)
def unfilled(mill: Mill, home: Path) -> Iterator[str]:
    yield Shell(home, "${REDIS_URL}").run("queue", "ls").line(3)


@fault("the local server's data dir may be written by others", same_for_all=True)
def foreign(mill: Mill, home: Path) -> Iterator[str]:
    folder = mill.server.data_dir
    folder.chmod(0o777)
    yield refusal(lambda: EmbeddedServer.start(folder))
    folder.chmod(0o700)


def serves(mill: Mill) -> bool:
    try:
        return mill.client.submit(SERVICE, ["again"], timeout=2.0).result() == ["again"]
    except MillstreamError:
        return False


CASES = [(name, says, engine) for name, says in rows() for engine in ENGINES[: 1 if name in SAME_FOR_ALL else None]]


def test_the_table_has_a_row_for_each_fault_that_is_made() -> None:
    assert [name for name, _ in rows()] == list(FAULTS)
    assert all(says for _, says in rows())


@pytest.mark.parametrize(("name", "says", "engine"), CASES, ids=lambda each: each if isinstance(each, str) else "")
def test_the_program_says_it_in_these_words_and_the_cure_heals_it(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    engine: str,
    name: str,
    says: list[str],
) -> None:
    logged: list[str] = []

    def all_said() -> str:
        # By this process, whose supervisor's thread may say it only now, or by its worker.
        logged.append(capfd.readouterr().err)
        return "".join([said, caplog.text, *logged])

    with milling(tmp_path, engines.binary_of(engine), tcp=True) as mill, caplog.at_level(logging.WARNING):
        assert serves(mill)

        with FAULTS[name](mill, tmp_path) as said:
            eventually(lambda: all(re.search(each, all_said()) for each in map(pattern, says)))

        eventually(lambda: serves(mill), within_s=LONG_S)
        assert mill.supervisor.restarts == 0


def pattern(sentence: str) -> str:
    return ".+".join(map(re.escape, sentence.split("...")))
