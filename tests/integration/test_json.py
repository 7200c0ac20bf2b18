"""Every command that shows something prints JSON with --json, and nothing else on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import click
import pytest
from bystander import Bystander
from click.testing import CliRunner
from workers import remove, spec

from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.errors import WorkerLost
from millstream.broker.contract.job import Reply
from millstream.broker.queue.deadletters import DeadLetters
from millstream.broker.queue.stream_types import Settlement
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client

CONFIG = "models: {m: {type: echo}}\nservices: {docs: {model: m}}\nredis: {url: 'redis://u:hidden@127.0.0.1:1'}\n"

LOOKS = {
    "bulk status",
    "config check",
    "config show",
    "dead ls",
    "dead show",
    "doctor",
    "job show",
    "job trace",
    "queue ls",
    "queue peek",
    "queue show",
    "top",
    "worker ls",
}
"""Commands that show a state. Each is run here with --json, `bulk status` in test_bulk.py."""

ANSWERS = {"bench", "embed", "generate", "job cancel", "job wait", "key ls", "route show", "tune"}
"""Commands that have --json, too, and tests of their own."""

ACTS = {
    "acl",
    "bulk retry-failed",
    "bulk run",
    "chat",
    "completion",
    "config push",
    "config schema",
    "dashboard",
    "dead export",
    "dead purge",
    "dead requeue",
    "exporter",
    "key add",
    "key revoke",
    "queue drain",
    "queue pause",
    "queue purge",
    "queue resume",
    "route canary start",
    "route canary stop",
    "route promote",
    "route rollback",
    "route set",
    "serve",
    "up",
    "worker drain",
    "worker run",
    "worker start",
    "worker stop",
}
"""Commands that change or start something, or print what is for another program as it is."""


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def test_every_command_that_shows_something_has_json() -> None:
    has_json = {
        name: any("--json" in parameter.opts for parameter in command.params) for name, command in commands(main)
    }

    assert {name for name, has in has_json.items() if has} == LOOKS | ANSWERS
    assert {name for name, has in has_json.items() if not has} - ACTS == set()


@pytest.fixture(scope="module")
def arguments(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, list[str]]]:
    """What each command needs, on a service with a worker, a waiting job and a dead letter."""
    connection, name = Connection(server.url, name="tests"), "test-json"
    nobody = Bystander(connection, spec(name, batch_size=1))
    nobody.live()
    file = tmp_path_factory.mktemp("json") / "config.yaml"
    file.write_text(CONFIG)
    with Client(server.url) as client:
        client.submit_detached(name, ["buried"])
        claim = nobody.claim_one()
        settlement = Settlement(claim.address, encode_reply(Reply(error=WorkerLost("died"))), "max_attempts")
        nobody.queue.streams.settle([settlement])
        waiting = client.submit_detached(name, ["水车"]).id
    (letter,) = DeadLetters(connection.client, nobody.queue.keys).page()
    url = ["--url", server.url]
    yield {
        "config check": [str(file)],
        "config show": [str(file)],
        "dead ls": [name, *url],
        "dead show": [name, letter.id, *url],
        "doctor": [name, *url],
        "job show": [waiting, *url],
        "job trace": [waiting, *url],
        "queue ls": url,
        "queue peek": [name, *url],
        "queue show": [name, *url],
        "top": [name, "--interval", "1ms", *url],
        "worker ls": url,
    }
    remove(server.url, name)
    connection.close()


@pytest.mark.parametrize("command", sorted(LOOKS - {"bulk status"}))
def test_a_command_prints_json_alone(arguments: Mapping[str, list[str]], command: str) -> None:
    done = CliRunner().invoke(main, [*command.split(), *arguments[command], "--json"])

    assert (done.exit_code, done.stderr) == (1 if command == "doctor" and done.exit_code else 0, "")
    found = json.loads(done.stdout)
    assert found
    assert "hidden" not in done.stdout


def test_json_of_an_empty_list_is_an_empty_list(arguments: Mapping[str, list[str]], server: EmbeddedServer) -> None:
    nothing = ["--url", server.url, "--prefix", "nobody-uses-this"]

    for command in (["queue", "ls"], ["worker", "ls"]):
        assert json.loads(CliRunner().invoke(main, [*command, *nothing, "--json"]).stdout) == []
