"""`millstream job show`, `wait` and `cancel`: jobs in each state, with a worker that answers when the test wants it."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from bystander import Bystander
from click.testing import CliRunner, Result
from contracts.queue import draft
from support import eventually

from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, ModelFailed, WorkerLost
from millstream.broker.contract.job import Priority, Reply
from millstream.broker.contract.partial import Record, encode_record
from millstream.broker.queue import job_details
from millstream.broker.queue.stream_types import Group, Settlement
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client

Run = Callable[..., Result]


@pytest.fixture
def run(server: EmbeddedServer) -> Run:
    return lambda *words: CliRunner().invoke(main, ["job", *words, "--url", server.url])


@pytest.fixture
def nobody(bystander: Callable[..., Bystander]) -> Bystander:
    """The only worker of its service, which claims and answers when the test wants it."""
    worker = bystander(batch_size=1)
    worker.live()
    return worker


def shown(run: Run, job_id: str) -> dict[str, str]:
    """What `job show` says of one job, by the first word of each line."""
    done = run("show", job_id)
    assert (done.exit_code, done.stderr) == (0, "")
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}


def record(run: Run, job_id: str) -> dict[str, Any]:
    done = run("show", job_id, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_waiting_job_shows_how_many_are_before_it(run: Run, client: Client, nobody: Bystander) -> None:
    ids = [client.submit_detached(nobody.name, [row], priority="batch").id for row in "abc"]

    facts = shown(run, ids[2])

    assert facts["job"] == ids[2]
    assert (facts["state"], facts["priority"]) == ("waiting, 2 jobs before it", "batch")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+Z, \d\.\ds ago", facts["accepted"])
    assert (facts["attempts"], facts["work"]) == ("0 that did not finish", "echo, 1 row, 2 tokens estimated")
    assert shown(run, ids[0])["state"] == "waiting, 0 jobs before it"
    # The id of a job alone: as `queue peek` shows it.
    assert shown(run, ids[2].rpartition(":")[2])["state"] == "waiting, 2 jobs before it"


def test_a_running_job_names_its_worker_and_one_that_was_given_back_its_history(
    run: Run, client: Client, nobody: Bystander
) -> None:
    first, second = (client.submit_detached(nobody.name, [row]) for row in "ab")
    claim = nobody.claim_one()

    running = shown(run, first.id)
    nobody.queue.lease.release("bystander", started=[claim.address.name], how="was killed")
    returned = shown(run, first.id)

    assert running["state"] == "running on bystander (unknown)"
    assert (returned["state"], returned["attempts"]) == ("given back, 0 jobs before it", "1 that did not finish")
    assert "was killed" in returned["history"]
    assert shown(run, second.id)["state"] == "waiting, 1 job before it"


def test_a_deadline_and_the_text_so_far_are_shown(run: Run, nobody: Bystander, connection: Connection) -> None:
    job = draft(deadline=time.monotonic() + 120.0)._replace(op="stream")
    nobody.queue.streams.enqueue([Group(Priority.NORMAL, [job])])
    partial = nobody.queue.keys.partial(job.id)
    connection.client.set(
        partial, encode_record(Record("水车", b"")) + encode_record(Record(" turns", b"1")), px=60_000
    )

    facts = shown(run, job.id)

    assert re.fullmatch(r"in (2m00s|1m59s)", facts["deadline"])
    assert facts["text"] == "8 characters so far"


def test_an_answered_call_is_done_failed_or_partly_failed(run: Run, client: Client, nobody: Bystander) -> None:
    calls = [client.submit_detached(nobody.name, [row]) for row in "abc"]
    done, failed, cancelled = calls
    claims = [nobody.claim_one() for _ in calls[:2]]
    nobody.answer(claims[0])
    nobody.settle(claims[1], Reply(error=ModelFailed("no such layer", hint="load another")))
    cancelled.cancel()

    assert shown(run, done.id)["state"] == "done"
    assert shown(run, failed.id)["state"] == "failed: model_failed: no such layer (load another)"
    assert shown(run, cancelled.id)["state"].startswith("cancelled: cancelled: ")
    assert re.fullmatch(r"for (1h00m|59m\d\ds)", shown(run, done.id)["kept"])
    assert [record(run, each.id)["jobs"][0]["state"] for each in calls] == ["done", "failed", "cancelled"]


def test_a_buried_job_leads_to_its_dead_letter(run: Run, client: Client, nobody: Bystander) -> None:
    detached = client.submit_detached(nobody.name, ["a"])
    claim = nobody.claim_one()
    reply = encode_reply(Reply(error=WorkerLost("its worker died each time")))
    assert nobody.queue.streams.settle([Settlement(claim.address, reply, "max_attempts")]) == ["answered"]

    facts = shown(run, detached.id)
    by_job = shown(run, detached.id.rpartition(":")[2])

    assert facts["state"] == by_job["state"] == "buried: max_attempts"
    assert re.fullmatch(rf"millstream dead show {nobody.name} \d+-0", facts["look"])
    # The letter outlives what the server knows of the call.
    detached.forget()
    eventually(lambda: "kept" not in shown(run, detached.id))
    assert shown(run, detached.id)["state"] == "buried: max_attempts"


def test_a_call_of_many_jobs_is_counted_and_listed(run: Run, client: Client, nobody: Bystander) -> None:
    detached = client.submit_detached(nobody.name, list("abcd"))
    nobody.answer(nobody.claim_one())
    nobody.claim_one()

    lines = run("show", detached.id).stdout.splitlines()

    assert lines[2].split(maxsplit=1) == ["jobs", "4, 1 answered: 1 done, 1 running, 2 waiting"]
    assert [line.split()[1] for line in lines[6:]] == ["done", "running", "waiting", "waiting"]
    few = run("show", detached.id, "--limit", "1").stdout.splitlines()
    assert few[2].split(maxsplit=1) == ["jobs", "4, 1 answered, the first 1: 1 done"]


def test_no_more_jobs_are_read_than_the_limit_to_find_a_place(
    run: Run, client: Client, nobody: Bystander, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_details, "MOST_AHEAD", 2)
    monkeypatch.setattr(job_details, "_PAGE", 1)
    ids = [client.submit_detached(nobody.name, [row]).id for row in "abcd"]

    assert [record(run, each)["jobs"][0]["ahead"] for each in ids] == [0, 1, None, None]
    assert shown(run, ids[3])["state"] == "waiting, more than 1000 jobs before it"


@pytest.mark.parametrize("command", ["show", "wait", "cancel"])
def test_an_unknown_job_is_one_line(run: Run, nobody: Bystander, command: str) -> None:
    gone, wrong = run(command, f"{nobody.name}:1x1:{'0' * 32}"), run(command, "embed")

    assert (gone.exit_code, gone.stdout, len(gone.stderr.splitlines())) == (1, "", 1)
    assert (wrong.exit_code, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)


def test_a_wait_prints_each_row_and_ends_with_the_status_of_its_error(
    run: Run, client: Client, nobody: Bystander
) -> None:
    detached = client.submit_detached(nobody.name, ["a", "b"])

    def answer() -> None:
        first, second = nobody.claim(2)
        nobody.answer(first)
        nobody.settle(second, Reply(values=[{"b": 1}]))

    answering = threading.Thread(target=answer)
    answering.start()

    done = run("wait", detached.id, "--timeout", "20s")
    answering.join()

    assert (done.exit_code, done.stdout, done.stderr) == (0, 'a\n{"b": 1}\n', "")
    lines = run("wait", detached.id, "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"index": 0, "result": "a"}, {"index": 1, "result": {"b": 1}}]


def test_a_wait_for_rows_that_failed_has_the_status_of_the_error_table(
    run: Run, client: Client, nobody: Bystander
) -> None:
    whole, part = client.submit_detached(nobody.name, ["a"]), client.submit_detached(nobody.name, ["b", "c"])
    nobody.settle(nobody.claim_one(), Reply(error=InputTooLong("9 tokens")))
    nobody.answer(nobody.claim_one())
    nobody.settle(nobody.claim_one(), Reply(error=InputTooLong("9 tokens")))

    failed, mixed = run("wait", whole.id), run("wait", part.id)

    assert (failed.exit_code, failed.stdout, failed.stderr) == (
        InvalidRequest.exit_code,
        "",
        "millstream: row 0: 9 tokens\n",
    )
    assert (mixed.exit_code, mixed.stdout, mixed.stderr) == (9, "b\n", "millstream: row 1: 9 tokens\n")
    (error,) = run("wait", whole.id, "--json").stdout.splitlines()
    assert json.loads(error)["error"]["code"] == "input_too_long"


def test_a_wait_that_takes_too_long_ends_with_7(run: Run, client: Client, nobody: Bystander) -> None:
    done = run("wait", client.submit_detached(nobody.name, ["a"]).id, "--timeout", "20ms")

    assert (done.exit_code, done.stdout) == (7, "")
    assert done.stderr == "millstream: no result within 0.02 s of waiting\n"


def test_a_cancellation_counts_what_waited_ran_and_was_answered(run: Run, client: Client, nobody: Bystander) -> None:
    detached = client.submit_detached(nobody.name, list("abcd"))
    nobody.answer(nobody.claim_one())
    nobody.claim_one()

    done = run("cancel", detached.id.rpartition(":")[2])

    assert done.stdout == f"{detached.id}: 2 waiting jobs cancelled, 1 will end, 1 answered before\n"
    again = json.loads(run("cancel", detached.id, "--json").stdout)
    assert again == {"id": detached.id, "waiting": 0, "running": 1, "answered": 3}


def test_a_job_that_a_client_waits_for_is_its_clients_to_cancel(run: Run, client: Client, nobody: Bystander) -> None:
    handle = client.submit(nobody.name, ["a"])
    eventually(lambda: run("show", handle.id).exit_code == 0)

    done = run("cancel", handle.id)

    assert (done.exit_code, "is not the id of a detached call" in done.stderr) == (2, True)
    nobody.answer(nobody.claim_one())
    handle.result(10)
