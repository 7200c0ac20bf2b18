"""Webhooks on a real server: whatever dies or refuses meanwhile, the receiver is told once its call is done."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from bystander import Bystander
from click.testing import CliRunner
from receivers import SECRET, Receiver, receiving
from support import eventually

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.config.webhooks import WebhookSettings
from millstream.broker.contract import webhooks as contract
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.webhook_urls import read_webhook_url
from millstream.broker.queue import diagnosis
from millstream.broker.queue import webhooks as queue_module
from millstream.broker.queue.examination import examine
from millstream.broker.queue.metrics import Metrics
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client
from millstream.client.detached import Detached
from millstream.worker.supervision import webhook_request, webhook_sender
from millstream.worker.supervision.webhook_sender import sending

Sending = Callable[[], AbstractContextManager[None]]

SEND = """
import sys
from pathlib import Path
from millstream.broker.config.webhooks import WebhookSettings
from millstream.worker.supervision.webhook_sender import sending

url, service, allowed, file = sys.argv[1:]
with sending(url, "ms", [service], WebhookSettings(allow=(allowed,), secret_file=Path(file))):
    sys.stdin.read()
"""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(Receiver()) as made:
        yield made


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    return file


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come within a second."""
    monkeypatch.setattr(queue_module, "FIRST_RETRY_S", 0.2)
    monkeypatch.setattr(contract, "LONGEST_RETRY_S", 0.2)
    monkeypatch.setattr(webhook_sender, "LOOK_S", 0.05)


@pytest.fixture
def nobody(connection: Connection, service: str, receiver: Receiver) -> Iterator[Bystander]:
    """The only worker of a service whose calls may name the receiver."""
    allowed = (f"http://127.0.0.1:{receiver.port}/",)
    model = ModelSpec(type="echo")
    worker = Bystander(
        connection, ServiceSpec(name=service, model=model, model_ref="m", runtime=Runtime(), webhooks=allowed)
    )
    worker.live()
    yield worker
    connection.client.srem("ms:services", service)


@pytest.fixture
def send(server: EmbeddedServer, service: str, receiver: Receiver, secret_file: Path) -> Sending:
    settings = WebhookSettings(allow=(f"http://127.0.0.1:{receiver.port}/",), secret_file=secret_file)
    return lambda: sending(server.url, "ms", [service], settings)


def end_one(client: Client, nobody: Bystander, url: str) -> Detached:
    """A call of two rows that is done."""
    detached = client.submit_detached(nobody.name, ["a", "b"], webhook=url)
    nobody.answer(*nobody.claim(1))
    return detached


def step(connection: Connection, service: str, detached: Detached) -> str:
    found = queue_module.Webhooks(connection.client, ServiceKeys(service)).read_state(detached.id.rpartition(":")[2])
    return found.step if found else ""


def is_empty(connection: Connection, service: str) -> bool:
    return not connection.client.xlen(ServiceKeys(service).webhooks())


def test_each_call_is_announced_once_and_its_results_stay(
    client: Client, connection: Connection, nobody: Bystander, receiver: Receiver, send: Sending
) -> None:
    with send(), send():
        calls = [end_one(client, nobody, receiver.url(f"hook?n={number}")) for number in range(20)]
        eventually(lambda: is_empty(connection, nobody.name))

    assert sorted(outcome.id for outcome in receiver.outcomes) == sorted(call.id for call in calls)
    assert {(each.service, each.state, each.rows, each.failed) for each in receiver.outcomes} == {
        (nobody.name, "done", 2, 0)
    }
    assert sorted(path for path, _, _ in receiver.requests) == sorted(f"/hook?n={number}" for number in range(20))
    assert [client.job(outcome.id).result(5) for outcome in receiver.outcomes] == [["a", "b"]] * 20
    assert Metrics(connection).read(nobody.name).webhooks == {"delivered": 20}


def test_doctor_says_that_webhooks_wait_and_nobody_sends_them(
    client: Client,
    connection: Connection,
    nobody: Bystander,
    secret_file: Path,
    send: Sending,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "UNSENT_MS", 300)

    def is_unsent() -> bool:
        found = examine(connection, names=[nobody.name]).findings
        return "no_webhook_sender" in {each.cause for each in found}

    with receiving(Receiver()) as gone:
        pass
    nobody.push(webhooks=(gone.url(),))
    assert not is_unsent()
    end_one(client, nobody, gone.url())

    eventually(is_unsent)
    with send():
        # The receiver is down, so the announcement stays.
        eventually(lambda: not is_unsent())
    assert not is_empty(connection, nobody.name)
    eventually(is_unsent)


def test_a_receiver_that_was_down_is_told_when_it_is_up(
    client: Client, connection: Connection, nobody: Bystander, receiver: Receiver, secret_file: Path, send: Sending
) -> None:
    with receiving(Receiver()) as gone:
        pass
    url = gone.url()
    nobody.push(webhooks=(url,))
    settings = WebhookSettings(allow=(url,), secret_file=secret_file)

    with sending(connection.url, "ms", [nobody.name], settings):
        detached = end_one(client, nobody, url)
        eventually(lambda: step(connection, nobody.name, detached) == "retrying")
        back = Receiver(port=gone.port)
        with receiving(back):
            eventually(lambda: step(connection, nobody.name, detached) == "delivered")

    assert [outcome.id for outcome in back.outcomes] == [detached.id]
    assert is_empty(connection, nobody.name)


def test_errors_of_a_receiver_are_tried_again_under_the_same_id(
    client: Client, connection: Connection, nobody: Bystander, receiver: Receiver, send: Sending
) -> None:
    receiver.statuses = [500, 503]

    with send():
        end_one(client, nobody, receiver.url())
        eventually(lambda: is_empty(connection, nobody.name))

    assert len(receiver.requests) == 3
    assert len(set(receiver.ids())) == 1
    assert len({body for _, _, body in receiver.requests}) == 1


def test_a_redirect_is_not_followed(
    client: Client, connection: Connection, nobody: Bystander, receiver: Receiver, send: Sending
) -> None:
    receiver.statuses = [302]

    with send():
        end_one(client, nobody, receiver.url())
        eventually(lambda: is_empty(connection, nobody.name))

    assert [path for path, _, _ in receiver.requests] == ["/hook", "/hook"]


def test_an_announcement_whose_sender_was_killed_is_sent_by_another(
    client: Client,
    connection: Connection,
    server: EmbeddedServer,
    nobody: Bystander,
    receiver: Receiver,
    secret_file: Path,
    send: Sending,
) -> None:
    receiver.hangs.set()
    words = [server.url, nobody.name, receiver.url(""), str(secret_file)]
    doomed = subprocess.Popen([sys.executable, "-c", SEND, *words], stdin=subprocess.PIPE)
    try:
        detached = end_one(client, nobody, receiver.url("hang"))
        eventually(lambda: receiver.requests)
    finally:
        os.kill(doomed.pid, signal.SIGKILL)
        doomed.communicate()
    receiver.hangs.clear()

    with send():
        eventually(lambda: step(connection, nobody.name, detached) == "delivered")

    assert [outcome.id for outcome in receiver.outcomes] == [detached.id] * 2
    assert len(set(receiver.ids())) == 1


def test_a_receiver_that_hangs_does_not_delay_others(
    client: Client, connection: Connection, nobody: Bystander, receiver: Receiver, secret_file: Path
) -> None:
    receiver.hangs.set()
    with receiving(Receiver()) as other:
        allowed = (receiver.url(""), other.url(""))
        nobody.push(webhooks=allowed)
        with sending(connection.url, "ms", [nobody.name], WebhookSettings(allow=allowed, secret_file=secret_file)):
            for _ in range(10):
                end_one(client, nobody, receiver.url("hang"))
            eventually(lambda: len(receiver.requests) == contract.MOST_PER_ORIGIN)
            began = time.monotonic()
            end_one(client, nobody, other.url())
            eventually(lambda: other.requests)

    assert time.monotonic() - began < 2.0
    assert len(receiver.requests) == contract.MOST_PER_ORIGIN


def test_a_receiver_that_hangs_is_cut_off(receiver: Receiver) -> None:
    receiver.hangs.set()
    url = read_webhook_url(receiver.url("hang"))

    assert webhook_request.post(url, {}, b"{}", limit_s=0.2) == "no answer within 0.2 s"


def test_an_announcement_is_given_up_after_its_time_with_a_line_in_the_log(
    client: Client,
    connection: Connection,
    nobody: Bystander,
    receiver: Receiver,
    send: Sending,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(queue_module, "GIVEN_UP_S", 0.0)
    receiver.statuses = [500]

    with send(), caplog.at_level(logging.ERROR):
        detached = end_one(client, nobody, receiver.url("token?secret=hidden"))
        eventually(lambda: step(connection, nobody.name, detached) == "given up")
        eventually(lambda: Metrics(connection).read(nobody.name).webhooks == {"given_up": 1})

    assert "given up: status 500" in caplog.text
    assert not [hidden for hidden in ("token", "hidden", SECRET) if hidden in caplog.text]


def test_a_sender_goes_only_where_its_own_file_allows(
    client: Client,
    connection: Connection,
    server: EmbeddedServer,
    nobody: Bystander,
    receiver: Receiver,
    secret_file: Path,
) -> None:
    settings = WebhookSettings(allow=("https://elsewhere.example.com/",), secret_file=secret_file)

    with sending(server.url, "ms", [nobody.name], settings):
        detached = end_one(client, nobody, receiver.url())
        eventually(lambda: step(connection, nobody.name, detached) == "retrying")

    assert receiver.requests == []


def test_job_show_says_what_became_of_the_webhook_and_hides_its_path(
    client: Client, connection: Connection, server: EmbeddedServer, nobody: Bystander, receiver: Receiver, send: Sending
) -> None:
    def show(*words: str) -> str:
        return CliRunner().invoke(main, ["job", "show", *words, "--url", server.url]).output

    detached = client.submit_detached(nobody.name, ["a"], webhook=receiver.url("token"))
    assert "sent when all jobs are answered" in show(detached.id)
    nobody.answer(*nobody.claim(1))
    assert "not sent yet" in show(detached.id)
    with send():
        eventually(lambda: step(connection, nobody.name, detached) == "delivered")

    assert f"http://127.0.0.1:{receiver.port}: delivered at" in show(detached.id)
    assert "token" not in show(detached.id)
    assert json.loads(show(detached.id, "--json"))["webhook"]["last"]["step"] == "delivered"


def test_the_same_key_with_another_webhook_is_another_call(
    client: Client, nobody: Bystander, receiver: Receiver
) -> None:
    first = client.submit_detached(nobody.name, ["a"], idempotency_key="k", webhook=receiver.url("a"))

    assert client.submit_detached(nobody.name, ["a"], idempotency_key="k", webhook=receiver.url("a")).id == first.id
    with pytest.raises(InvalidRequest):
        client.submit_detached(nobody.name, ["a"], idempotency_key="k", webhook=receiver.url("b"))


def test_the_example_receives_and_verifies(
    client: Client, connection: Connection, server: EmbeddedServer, nobody: Bystander, secret_file: Path
) -> None:
    program = Path(__file__).parents[2] / "docs/examples/webhook_receiver.py"
    words = [sys.executable, str(program), "0", str(secret_file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout
            url = f"http://127.0.0.1:{process.stdout.readline().split()[-1]}/"
            nobody.push(webhooks=(url,))
            settings = WebhookSettings(allow=(url,), secret_file=secret_file)
            with sending(server.url, "ms", [nobody.name], settings):
                detached = end_one(client, nobody, url)
                line = process.stdout.readline()
        finally:
            process.terminate()

    assert line == f"{detached.id} is done: 0 of 2 rows failed\n"
