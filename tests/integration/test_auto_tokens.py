"""`max_batch_tokens: auto` on a real model: measured before the worker is ready, in force, and told."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from support import eventually
from workers import remove, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.inspector import Inspector
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.worker.measuring.probe import LEAST_TOKENS

BATCH_SIZE = 16
TINY_LIMIT = 32
"""As models.py has it, which imports torch."""


def test_a_worker_measures_its_budget_keeps_to_it_and_says_what_it_found(
    server: EmbeddedServer, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"test-auto-{uuid.uuid4().hex[:8]}"
    model = ModelSpec(type="embedding", model_name=str(tiny_model), device="cpu")
    runtime = Runtime.model_validate({"max_batch_tokens": "auto", "batch_size": BATCH_SIZE})
    spec = ServiceSpec(name=name, model=model, model_ref="m", runtime=runtime)
    connection = Connection(server.url, name="tests")

    with working(server.url, spec), Client(server.url) as client:
        vectors = client.submit(name, ["a mill"] * 300).result(timeout=30)
        eventually(lambda: Inspector(connection).services([name])[0].forwards)
        (worker,) = Inspector(connection).services([name])[0].workers

    assert len(vectors) == 300
    # The sizes of the probe, where no row reads more.
    assert worker.batch_tokens in (LEAST_TOKENS, BATCH_SIZE * TINY_LIMIT)
    limits = f"at most {BATCH_SIZE} rows and {worker.batch_tokens} tokens (measured) a forward"
    said = capfd.readouterr().err
    assert f"{limits}, texts packed, reads {TINY_LIMIT} tokens a text" in said
    assert worker.text_tokens == TINY_LIMIT
    remove(server.url, name)
    connection.close()


@pytest.mark.skipif(os.environ.get("MILLSTREAM_LONG") != "1", reason="MILLSTREAM_LONG is not 1")
def test_a_worker_with_kernels_off_is_ready_without_packing(
    server: EmbeddedServer, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"test-kernels-{uuid.uuid4().hex[:8]}"
    model = ModelSpec(type="embedding", model_name=str(tiny_model), device="cpu", kernels="off")
    spec = ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime())

    with working(server.url, spec), Client(server.url) as client:
        vectors = client.submit(name, ["a mill", "the stream turns a mill"]).result(timeout=30)

    ready = next(line for line in capfd.readouterr().err.splitlines() if "ready: " in line)
    assert len(vectors) == 2
    assert "texts packed" not in ready
    assert f"reads {TINY_LIMIT} tokens a text" in ready
    remove(server.url, name)
