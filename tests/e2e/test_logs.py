"""The logs of real workers at debug: JSON lines, one for each batch, and neither inputs nor passwords in them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import engines
import pytest
import redis
from e2e.cli_support import COMMAND, environment
from support import eventually

from millstream.broker.contract.errors import MillstreamError
from millstream.client import Client

SECRET = "s3cr3t-0f-redis"
MARKER = "marker-of-a-payload"
LONG_S = 60.0

CONFIG = """\
models: {m: {type: custom, handler: 'meal:grind'}, e: {type: echo}}
services: {mill: {model: m, runtime: {max_attempts: 1, worker_count: 1}}, copy: {model: e}}
"""

CODE = """
import os


def grind(payloads):
    for each in payloads:
        if each.startswith("raise"):
            raise ValueError(f"cannot grind {each}")
        if each.startswith("exit"):
            os._exit(7)
    return payloads
"""


@contextmanager
def up(home: Path, url: str) -> Iterator[Path]:
    """Runs `up` with all of its output in the file that is yielded."""
    log = home / "log"
    words = [str(COMMAND), "up", "--log-format", "json", "--log-level", "debug"]
    with log.open("wb") as stderr, (home / "out").open("wb") as stdout:
        process = subprocess.Popen(
            words, cwd=home, env=environment(home, url), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )
    try:
        eventually(lambda: "ready: " in (home / "out").read_text() or process.poll() is not None, within_s=LONG_S)
        assert process.poll() is None, log.read_text()
        yield log
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LONG_S)


def test_logs_at_debug_have_a_line_for_each_batch_and_no_payload_or_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "meal.py").write_text(CODE)
    caplog.set_level(logging.DEBUG)
    with engines.serving(engines.binary_of("valkey9"), tmp_path) as port:
        server = redis.Redis(port=port, protocol=2)
        server.acl_setuser("default", enabled=True, reset_passwords=True, passwords=[f"+{SECRET}"])
        url = f"redis://:{SECRET}@127.0.0.1:{port}"
        with up(tmp_path, url) as log, Client(url, prefix="ms") as client:
            assert client.submit("mill", [MARKER]).result(LONG_S) == [MARKER]
            assert client.submit("copy", [MARKER]).result(LONG_S) == [MARKER]
            for cause in ("raise", "exit"):
                with pytest.raises(MillstreamError):
                    client.submit("mill", [f"{cause} {MARKER}"]).result(LONG_S)
            admin = redis.Redis.from_url(url, protocol=2)
            admin.xadd("ms:{copy}:q:normal", {"body": MARKER})
            eventually(lambda: admin.xlen("ms:{copy}:dead") == 1)
            # A server that refuses the password is an error that the workers log again and again.
            admin.acl_setuser("default", enabled=True, reset_passwords=True, passwords=["+other"])
            admin.client_kill_filter(_type="normal", skipme=True)
            eventually(lambda: "the server is away" in log.read_text(), within_s=LONG_S)
            second = redis.Redis.from_url(url.replace(SECRET, "other"), protocol=2)
            second.acl_setuser("default", enabled=True, reset_passwords=True, passwords=[f"+{SECRET}"])
            eventually(lambda: "the server is back" in log.read_text(), within_s=LONG_S)

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    batches = [each for each in lines if each["message"].startswith("batch: ")]
    assert {each["service"] for each in batches} == {"mill", "copy"}
    assert all(each["level"] == "debug" and each["worker"] and each["ts"] for each in batches)
    assert [each["message"] for each in lines if "a forward failed: ValueError" in each["message"]]
    assert [each["message"] for each in lines if "exited with status 7" in each["message"]]
    everything = log.read_text() + (tmp_path / "out").read_text() + caplog.text
    assert [secret for secret in (MARKER, SECRET) if secret in everything] == []


def test_a_wrong_setting_of_the_log_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG + "telemetry: {log_format: yaml}\n")

    done = subprocess.run(
        [COMMAND, "up"],
        cwd=tmp_path,
        env={**os.environ, **environment(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )

    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "millstream: config.yaml:3: telemetry.log_format: must be 'text' or 'json', not 'yaml'"
    ]
