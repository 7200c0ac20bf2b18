"""`millstream up` and `millstream worker run` send what their config.yaml allows."""

from __future__ import annotations

from pathlib import Path

from e2e.cli_support import Shell
from receivers import SECRET, Receiver, receiving
from support import eventually

from millstream.broker.queue.metrics import Metrics
from millstream.broker.transport.connection import Connection
from millstream.client import Client

CONFIG = """\
models: {{m: {{type: echo}}}}
services: {{{name}: {{model: m}}}}
webhooks:
  allow: ["{allowed}"]
  secret_file: {secret}
"""


def test_up_and_worker_run_announce_calls_that_are_done(shell: Shell, connection: Connection, name: str) -> None:
    secret = Path(shell.home, "secret")
    secret.write_text(SECRET)
    with receiving(Receiver()) as receiver:
        config = CONFIG.format(name=name, allowed=receiver.url(""), secret=secret)
        Path(shell.home, "config.yaml").write_text(config)
        for words in (["up"], ["worker", "run"]):
            with shell.background(*words) as running, Client(shell.url, prefix="ms") as client:
                eventually(lambda: name in client_services(connection), within_s=60.0)
                detached = client.submit_detached(name, ["a"], webhook=receiver.url())
                eventually(lambda: receiver.outcomes, within_s=60.0)
                eventually(lambda: Metrics(connection).read(name).webhooks.get("delivered"), within_s=60.0)
                running.interrupt()
                assert running.process.wait(30) == 0
            assert [outcome.id for outcome in receiver.outcomes] == [detached.id]
            assert SECRET not in running.out + running.err
            receiver.requests.clear()


def client_services(connection: Connection) -> list[str]:
    return [each.decode() for each in connection.client.smembers("ms:services")]
