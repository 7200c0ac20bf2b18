"""The installed command pauses, drains and empties queues, and deals with dead letters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from bystander import Bystander
from contracts.queue import draft
from e2e.cli_support import Ended, Shell, some
from e2e.sites import echo
from support import eventually

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import Cancelled
from millstream.broker.contract.keys import RETURNED
from millstream.broker.queue.deadletters import DeadLetters
from millstream.broker.queue.pause import Pause, find_pause, pause
from millstream.broker.transport.connection import Connection
from millstream.client import Client


@pytest.fixture
def service(url: str) -> Iterator[Bystander]:
    """An echo service whose worker is the test."""
    connection = Connection(url, name="tests")
    yield Bystander(connection, echo(""))
    connection.close()


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Shell:
    return Shell(tmp_path, url)


def done(ended: Ended) -> str:
    """What a command printed that went well."""
    assert (ended.code, ended.err) == (0, "")
    return ended.out.decode()


def paused(service: Bystander) -> Pause | None:
    return find_pause(service.queue.client, service.queue.keys)


def letters(service: Bystander) -> DeadLetters:
    return DeadLetters(service.queue.client, service.queue.keys)


def bury(service: Bystander, *, malformed: bool = False) -> None:
    if malformed:
        service.queue.put_raw({b"hello": b"\x1b[31m"})
    else:
        service.queue.put(draft())
    service.queue.settle(service.queue.claim("w1").claims, bury="malformed" if malformed else "max_attempts")


@some(
    ["queue", "pause"],
    ["queue", "resume"],
    ["queue", "purge", "--yes"],
    ["queue", "drain"],
    ["dead", "export"],
    ["dead", "ls"],
)
def test_an_unknown_service_meets_the_nearest_name(shell: Shell, service: Bystander, words: list[str]) -> None:
    assert f"did you mean {service.name}?" in shell.run(*words, service.name[:-1] + "x").line(4)


def test_a_pause_is_shown_until_it_is_resumed(shell: Shell, service: Bystander) -> None:
    assert f"millstream queue resume {service.name}" in done(shell.run("queue", "pause", service.name))
    assert paused(service) == Pause()
    assert re.search(rf"^{service.name} .* yes$", done(shell.run("queue", "ls")), re.MULTILINE)

    assert "60 s, refusing" in done(shell.run("queue", "pause", service.name, "--for", "1m", "--new"))
    listed = json.loads(done(shell.run("queue", "ls", "--json")))
    (shown,) = [each["paused"] for each in listed if each["name"] == service.name]
    assert (shown["refusing"], 0 < shown["left_ms"] <= 60_000) == (True, True)

    assert done(shell.run("queue", "resume", service.name)) == f"{service.name}: resumed\n"
    assert done(shell.run("queue", "resume", service.name)) == f"{service.name}: was not paused\n"
    assert paused(service) is None
    assert re.search(rf"^{service.name} .* -$", done(shell.run("queue", "ls")), re.MULTILINE)


@pytest.mark.parametrize("time", ["0", "-5", "soon"])
def test_a_pause_for_no_time_is_wrong_usage(shell: Shell, service: Bystander, time: str) -> None:
    ended = shell.run("queue", "pause", service.name, f"--for={time}")

    assert (ended.code, paused(service)) == (2, None)
    assert "--for" in ended.err


def test_draining_ends_when_nothing_is_in_flight_and_leaves_the_service_paused(
    shell: Shell, service: Bystander
) -> None:
    claims = service.queue.hold("w1", draft())
    service.queue.put(draft())

    with shell.background("queue", "drain", service.name) as drain:
        eventually(lambda: paused(service))
        assert drain.process.poll() is None
        service.answer(*claims)
        code = drain.process.wait(30)

    assert (code, drain.err) == (0, "")
    assert (service.queue.depth(), paused(service)) == (1, Pause())


def test_draining_in_vain_says_what_is_in_flight(shell: Shell, service: Bystander) -> None:
    service.queue.hold("w1", draft())
    # A command can take longer to start than a lease.
    service.queue.passed(1_000, hold_ms=60_000)
    pause(service.queue.client, service.queue.keys, for_s=60.0, refusing=True)

    line = shell.run("queue", "drain", service.name, "--timeout", "100ms").line(7)

    assert "1 job of" in line
    assert paused(service) == Pause(refusing=True), "as before, and it does not end by itself"


def test_draining_gives_back_what_a_lost_host_held(shell: Shell, service: Bystander) -> None:
    claims = service.queue.hold("lost", draft())
    service.queue.age("lost", claims)
    service.queue.silence("lost")
    service.queue.passed(1000)

    done(shell.run("queue", "drain", service.name))

    assert len(service.queue.held_by(RETURNED)) == 1


def test_purging_needs_a_yes_and_tells_the_callers(shell: Shell, service: Bystander) -> None:
    service.queue.put(draft(), draft())

    assert "--yes" in shell.run("queue", "purge", service.name).line(2)
    assert service.queue.depth() == 2

    assert done(shell.run("queue", "purge", service.name, "--yes")) == f"{service.name}: 2 jobs purged\n"
    assert service.queue.depth() == 0
    assert [type(decode_reply(reply).error) for _, reply in service.queue.replies()] == [Cancelled, Cancelled]


def test_dead_letters_are_listed_shown_and_exported(shell: Shell, service: Bystander) -> None:
    assert done(shell.run("dead", "ls", service.name)) == f"{service.name}: no dead letter\n"
    bury(service)
    bury(service, malformed=True)
    newest, oldest = letters(service)

    table = done(shell.run("dead", "ls", service.name)).splitlines()
    first = shell.run("dead", "ls", service.name, "--count", "1", "--json")
    second = json.loads(done(shell.run("dead", "ls", service.name, "--count", "1", "--json", "--before", newest.id)))
    shown = done(shell.run("dead", "show", service.name, oldest.id))
    escaped = done(shell.run("dead", "show", service.name, newest.id))
    exported = [json.loads(line) for line in done(shell.run("dead", "export", service.name)).splitlines()]

    assert [line.split()[0] for line in table] == ["ID", newest.id, oldest.id]
    assert re.search(r"Z +max_attempts +normal +echo +1 +0 +w1$", table[2])
    assert [*json.loads(first.out), *second] == exported
    assert [each["id"] for each in exported] == [newest.id, oldest.id]
    assert exported[1]["fields"]["body"] == '{"inputs":["a b c"]}'
    assert f"reason max_attempts\nentry {oldest.entry}\n" in shown
    assert '\nbody {"inputs":["a b c"]}\n' in shown
    assert "hello \\x1b[31m" in escaped


def test_more_letters_than_are_listed_are_announced(shell: Shell, service: Bystander) -> None:
    bury(service)
    bury(service)

    ended = shell.run("dead", "ls", service.name, "--count", "1")

    assert f"2 in all; older ones: --before {letters(service).page(1)[0].id}" in ended.err


def test_a_requeued_letter_is_answered_under_the_id_that_was_printed(shell: Shell, service: Bystander) -> None:
    bury(service)
    (letter,) = letters(service)

    line = done(shell.run("dead", "requeue", service.name, letter.id))
    service.answer(*service.claim(1))

    assert line.startswith(f"{letter.id} is {service.name}:1x1:")
    with Client(shell.url, prefix="ms") as client:
        assert client.job(line.split()[-1]).result(timeout=10) == ["a b c"]
    assert len(letters(service)) == 0


def test_all_that_can_run_again_is_requeued_and_the_rest_is_named(shell: Shell, service: Bystander) -> None:
    bury(service)
    bury(service, malformed=True)
    bury(service)
    (malformed,) = [letter.id for letter in letters(service) if letter.reason == "malformed"]

    ended = shell.run("dead", "requeue", service.name, "--all")

    assert (ended.code, len(ended.out.splitlines()), len(ended.err.splitlines())) == (9, 2, 1)
    assert malformed in ended.err
    assert [letter.id for letter in letters(service)] == [malformed]
    assert service.queue.depth() == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["requeue"], "--all"),
        (["requeue", "1-1"], "no dead letter 1-1"),
        (["requeue", "1-1", "--all"], "--all"),
        (["show", "1-1"], "no dead letter 1-1"),
        (["show", "nonsense"], "nonsense"),
        (["purge"], "--yes"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_cannot_be_done_is_said_in_a_line(shell: Shell, service: Bystander, words: list[str], says: str) -> None:
    bury(service)

    assert says in shell.run("dead", words[0], service.name, *words[1:]).line(2)

    assert len(letters(service)) == 1


def test_letters_are_purged_by_id_or_all(shell: Shell, service: Bystander) -> None:
    for _ in range(3):
        bury(service)
    newest, *rest = letters(service)

    assert "1 dead letter removed" in done(shell.run("dead", "purge", service.name, newest.id, "--yes"))
    assert list(letters(service)) == rest
    assert "2 dead letters removed" in done(shell.run("dead", "purge", service.name, "--yes"))
    assert list(letters(service)) == []
