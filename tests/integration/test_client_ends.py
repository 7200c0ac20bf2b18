"""A process that made calls ends like any other, and a client nobody has any more leaves nothing behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bystander import Bystander
from support import eventually
from workers import LONG_S

from millstream import client as module
from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.job import Reply
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client

LEAVING = Path(__file__).with_name("leaving.py")
WAYS = ["main_ends", "exits", "drops_everything", "leaves_the_loop", "is_interrupted"]
END_S = 5.0


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("millstream-")}


@pytest.mark.parametrize("way", WAYS)
def test_a_process_ends_at_once_and_silently_with_calls_under_way(
    server: EmbeddedServer, bystander: Callable[..., Bystander], way: str
) -> None:
    service = bystander()

    done = subprocess.run(
        [sys.executable, "-X", "dev", LEAVING, way, server.url, service.name],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    ended_after = time.monotonic() - float(done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert ended_after < END_S


def test_a_client_that_nobody_has_any_more_ends_its_threads_and_connections(
    server: EmbeddedServer, connection: Connection, echo: str
) -> None:
    def connected() -> int:
        return sum(each["name"] == "millstream-client" for each in connection.client.client_list())

    before, threads_before = connected(), own_threads()
    client = Client(server.url)
    assert client.submit(echo, ["a"]).result(LONG_S) == ["a"]
    assert connected() > before
    gone = weakref.ref(client._calls)

    del client
    gc.collect()

    eventually(lambda: gone() is None)
    # Threads and connections of an earlier test may end meanwhile, too.
    eventually(lambda: own_threads() <= threads_before, within_s=LONG_S)
    eventually(lambda: connected() <= before, within_s=LONG_S)


def test_a_call_outlives_the_name_of_its_client(server: EmbeddedServer, echo: str) -> None:
    handle = Client(server.url).submit(echo, ["a"])
    gc.collect()

    assert handle.result(LONG_S) == ["a"]


def test_an_answered_call_is_kept_alive_by_nobody(client: Client, echo: str) -> None:
    handle = client.submit(echo, ["a"])
    assert handle.result(LONG_S) == ["a"]
    gone = weakref.ref(handle)

    del handle

    eventually(lambda: gone() is None)


def test_the_module_embeds_with_a_client_of_its_own(
    server: EmbeddedServer, connection: Connection, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLSTREAM_REDIS_URL", server.url)
    module.default.cache_clear()
    bystander = Bystander(connection, embedding(service))
    vectors = np.eye(2, 3, dtype=np.float32)
    worker = threading.Thread(target=lambda: bystander.settle(bystander.claim_one(), Reply(vectors=vectors)))
    worker.start()

    answer = module.embed(["a", "b"], service=service)

    worker.join(LONG_S)
    assert np.array_equal(answer, vectors)
    assert module.default() is module.default()
    module.default().close()
    module.default.cache_clear()
    connection.client.srem("ms:services", service)


def embedding(name: str) -> ServiceSpec:
    return ServiceSpec(name=name, model=ModelSpec(type="embedding", model_name="m"), model_ref="m", runtime=Runtime())
