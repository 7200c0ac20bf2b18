"""`queue show` and `worker ls`: what a real worker did, and which limit cut its batches."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Callable, Iterator

import pytest
from bystander import Bystander
from click.testing import CliRunner
from contracts.queue import Queue, draft
from support import eventually
from workers import remove, spec, working

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Group
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main

LIMITS = {"batch_size": 4, "max_batch_tokens": 16, "inference_timeout": 30.0}


@pytest.fixture(scope="module")
def worked(server: EmbeddedServer) -> Iterator[str]:
    """An echo service whose live worker ran 12 short rows, and 8 of which two fill a forward: a job each."""
    name = f"test-show-{uuid.uuid4().hex[:8]}"
    wanted = spec(name, **LIMITS)
    connection = Connection(server.url, name="tests")
    Registry(connection).push([wanted])
    streams = Queue(connection.client, ServiceKeys(name)).streams
    for priority, texts in ((Priority.REALTIME, ["one two"] * 12), (Priority.NORMAL, ["1 2 3 4 5 6 7 8"] * 8)):
        job = Draft(secrets.token_hex(16), "echo", len(texts), 8 * len(texts), encode_inputs(texts, {}))
        streams.enqueue([Group(priority, [job])])
    with working(server.url, wanted):
        eventually(lambda: Inspector(connection).services([name])[0].forwards == 7)
        yield name
    remove(server.url, name)
    connection.close()


def look(server: EmbeddedServer, *words: str) -> str:
    result = CliRunner().invoke(main, [*words, "--url", server.url])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_it_shows_what_cut_the_batches_of_a_real_worker(server: EmbeddedServer, worked: str) -> None:
    assert look(server, "queue", "show", worked).splitlines() == [
        f"service    {worked}: echo sleep:0.0",
        "waiting    realtime 0, normal 0, batch 0, given back 0",
        "in flight  0",
        "at most    realtime 10000, normal 10000, batch 10000, in flight included (max_queue_size)",
        "oldest     -",
        "workers    1",
        "batches    7, 2.9 rows each, padding 1.00",
        "",
        "CUT BY   BATCHES  SHARE             LIMIT",
        "rows     2        29%    ######     batch_size 4",
        "tokens   3        43%    #########  max_batch_tokens 16",
        "time     0        0%                inference_timeout 30s, half of it",
        "padding  0        0%                the lengths of the waiting texts",
        "arrival  2        29%    ######     no more jobs were waiting",
    ]


def test_json_has_the_same_and_every_workers_own(server: EmbeddedServer, worked: str) -> None:
    found = json.loads(look(server, "queue", "show", worked, "--json"))

    cuts = {"rows": 2, "tokens": 3, "time": 0, "padding": 0, "arrival": 2}
    assert (found["name"], found["depth"], found["forwards"], found["cuts"]) == (worked, 0, 7, cuts)
    sizes = {"realtime": 10_000, "normal": 10_000, "batch": 10_000}
    limits = {"batch_size": 4, "max_batch_tokens": 16, "inference_timeout": 30.0, "max_queue_size": sizes}
    assert found["limits"] == limits
    assert [(each["batch_tokens"], each["cuts"]) for each in found["workers"]] == [(16, cuts)]


def test_the_list_of_services_and_that_of_workers_have_it_too(server: EmbeddedServer, worked: str) -> None:
    services = {each["name"]: each for each in json.loads(look(server, "queue", "ls", "--json"))}
    workers = {each["service"]: each for each in json.loads(look(server, "worker", "ls", "--json"))}

    assert services[worked]["cuts"]["tokens"] == 3
    assert workers[worked]["batch_tokens"] == 16


def test_without_a_worker_nothing_was_cut(
    server: EmbeddedServer, service: str, bystander: Callable[..., Bystander]
) -> None:
    bystander(max_batch_tokens="auto").queue.put(draft(), priority=Priority.BATCH)

    shown = look(server, "queue", "show", service).splitlines()

    assert shown[1] == "waiting    realtime 0, normal 0, batch 1, given back 0"
    assert shown[5:7] == ["workers    0", "batches    0"]
    assert [line.split()[1:3] for line in shown[9:]] == [["0", "-"]] * 5
    assert "max_batch_tokens auto" in shown[10]


def test_a_service_that_is_not_there_is_one_line(server: EmbeddedServer, worked: str) -> None:
    result = CliRunner().invoke(main, ["queue", "show", f"{worked}s", "--url", server.url])

    assert (result.exit_code, result.stdout) == (4, "")
    assert f"did you mean {worked}?" in result.stderr
