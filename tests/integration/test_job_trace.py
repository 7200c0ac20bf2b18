"""`job trace`: where a job is, what ran it, and how long each stage took, by the server's clock."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from bystander import Bystander
from click.testing import CliRunner, Result
from support import eventually
from workers import remove, spec, working

from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.job import Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.job_trace import read_traces
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client

FORWARD_S = 0.05


@pytest.fixture(scope="module")
def worked(server: EmbeddedServer) -> Iterator[str]:
    """A service with a real worker, whose forwards take FORWARD_S."""
    name = f"test-trace-{uuid.uuid4().hex[:8]}"
    with working(server.url, spec(name, forward_s=FORWARD_S, batch_size=2)):
        yield name
    remove(server.url, name)


def run(server: EmbeddedServer, *words: str) -> Result:
    return CliRunner().invoke(main, ["job", "trace", *words, "--url", server.url])


def trace(server: EmbeddedServer, job_id: str, *words: str) -> list[dict[str, Any]]:
    done = run(server, job_id, "--json", *words)
    assert done.exit_code == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_each_stage_of_an_answered_detached_job_has_its_time(
    server: EmbeddedServer, client: Client, connection: Connection, worked: str
) -> None:
    before = time.time() * 1000
    detached = client.submit_detached(worked, ["a b", "c d"])
    detached.result(timeout=30)
    after = time.time() * 1000

    (found,) = trace(server, detached.id)
    (worker,) = Inspector(connection).services([worked])[0].workers

    times = [found[name] for name in ("enqueued", "claimed", "prepared", "started", "ended", "settled")]
    # The worker's estimate of the server's clock may be off by a millisecond or two.
    assert all(later >= earlier - 5 for earlier, later in pairwise(times))
    assert before - 5 <= times[0] <= times[-1] + 5 <= after + 10
    assert times[4] - times[3] >= FORWARD_S * 1000 - 5
    assert (found["state"], found["worker"], found["attempts"], found["batch"]) == (
        "answered",
        worker.consumer,
        0.0,
        2,
    )


def test_a_person_reads_the_stages_line_by_line(server: EmbeddedServer, client: Client, worked: str) -> None:
    detached = client.submit_detached(worked, ["a"])
    detached.result(timeout=30)

    lines = run(server, detached.id).stdout.splitlines()

    assert [line.split()[0] for line in lines if line] == [
        "job",
        "service",
        "state",
        "worker",
        "attempt",
        "batch",
        "STAGE",
        "enqueue",
        "claim",
        "prepare",
        "start",
        "forward",
        "settle",
        "total",
    ]
    assert max(map(len, lines)) <= 100


def test_a_call_of_many_jobs_is_a_table_of_some_of_them(server: EmbeddedServer, client: Client, worked: str) -> None:
    detached = client.submit_detached(worked, ["a"] * 10)
    detached.result(timeout=30)

    lines = run(server, detached.id, "--limit", "3").stdout.splitlines()

    assert lines[0].split()[0] == "JOB"
    assert [line.split()[1] for line in lines[1:4]] == ["answered"] * 3
    assert lines[4:] == ["2 more jobs: say --limit 5"]
    assert len(trace(server, detached.id)) == 5


def test_a_waiting_and_a_running_job_show_what_is_known_so_far(
    server: EmbeddedServer, client: Client, bystander: Callable[..., Bystander]
) -> None:
    nobody = bystander()
    nobody.live()
    handle = client.submit(nobody.name, ["a"], priority="realtime")
    eventually(lambda: run(server, handle.id).exit_code == 0)

    (waiting,) = trace(server, handle.id)
    claim = nobody.claim_one()
    (running,) = trace(server, handle.id)
    nobody.queue.lease.release("bystander", started=[claim.address.name], how="was killed")
    (returned,) = trace(server, handle.id)
    (again,) = nobody.claim(1)
    (running_again,) = trace(server, handle.id)
    nobody.answer(again)
    handle.result(30)
    (settled,) = trace(server, handle.id)

    assert (waiting["state"], waiting["priority"], waiting["rows"], waiting["worker"]) == ("waiting", "realtime", 1, "")
    assert waiting["enqueued"]
    assert waiting["claimed"] is None
    assert (running["state"], running["worker"], running["attempts"]) == ("running", "bystander", 0.0)
    assert (returned["state"], returned["worker"], returned["attempts"]) == ("given back", "", 1.0)
    assert "was killed" in returned["history"][0]
    assert (running_again["state"], running_again["attempts"]) == ("running", 1.0)
    assert (settled["state"], settled["enqueued"]) == ("settled", waiting["enqueued"])
    assert waiting["now"] <= settled["settled"] <= settled["now"]


def test_a_detached_job_that_failed_names_its_error(
    server: EmbeddedServer, client: Client, bystander: Callable[..., Bystander]
) -> None:
    nobody = bystander()
    nobody.live()
    detached = client.submit_detached(nobody.name, ["a"])
    nobody.settle(nobody.claim_one(), Reply(error=ModelFailed("no")))

    (found,) = trace(server, detached.id)

    # An older worker's reply has no stages.
    assert (found["state"], found["error"], found["enqueued"]) == ("answered", "model_failed", None)
    assert "answered with model_failed" in run(server, detached.id).stdout


@pytest.mark.parametrize(("job_id", "code"), [("0" * 32, 1), (f"none:1x1:{'0' * 32}", 1), ("embed", 2)])
def test_an_unknown_job_is_one_line(server: EmbeddedServer, job_id: str, code: int) -> None:
    done = run(server, job_id)

    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)


def test_a_stream_that_is_missing_is_no_error(server: EmbeddedServer, connection: Connection, service: str) -> None:
    keys = ServiceKeys(service)
    connection.client.set(keys.seen("0" * 32), "1:1700000000000-0", px=60_000)

    (found,) = read_traces(connection, keys, ["0" * 32])

    assert found
    assert (found.state, found.enqueued, found.settled) == ("settled", 1_700_000_000_000, None)
