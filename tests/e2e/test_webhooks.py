"""`millstream up` and `millstream worker run` send what their config.yaml allows."""

from __future__ import annotations

import uuid
from pathlib import Path

from e2e.cli_support import Shell
from receivers import SECRET, Receiver, receiving
from support import eventually
from workers import remove

from millstream.client import Client

CONFIG = """\
models: {{m: {{type: echo}}}}
services: {{{name}: {{model: m}}}}
webhooks:
  allow: ["{allowed}"]
  secret_file: {secret}
"""


def test_up_and_worker_run_announce_calls_that_are_done(url: str, tmp_path: Path) -> None:
    name, secret, shell = f"test-{uuid.uuid4().hex[:8]}", tmp_path / "secret", Shell(tmp_path, url)
    secret.write_text(SECRET)
    with receiving(Receiver()) as receiver:
        config = CONFIG.format(name=name, allowed=receiver.url(""), secret=secret)
        (tmp_path / "config.yaml").write_text(config)
        assert shell.run("config", "push").code == 0
        for words in (["up"], ["worker", "run", name]):
            with shell.background(*words) as running, Client(url, prefix="ms") as client:
                detached = client.submit_detached(name, ["a"], webhook=receiver.url())
                eventually(lambda: receiver.outcomes, within_s=60.0)
                running.interrupt()
                assert running.process.wait(30) == 0
            assert [outcome.id for outcome in receiver.outcomes] == [detached.id]
            assert SECRET not in running.out + running.err
            receiver.requests.clear()
    remove(url, name)
