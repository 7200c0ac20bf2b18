"""A server that lost all its keys: whoever holds a service registers it again, and the work goes on."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from integration.faults import SERVICE, Mill, milling
from support import eventually
from workers import LONG_S

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import DeadlineExceeded, MillstreamError, UnknownService
from millstream.broker.contract.job import PRIORITIES
from millstream.broker.contract.keys import GROUP
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.client.handle import Handle
from millstream.worker.supervision.registrar import Registrar, Registration

HEALED_S = 5.0
"""Within which a new call works again."""


def spec(**runtime: object) -> ServiceSpec:
    return ServiceSpec(
        name=SERVICE, model=ModelSpec(type="echo"), model_ref="m", runtime=Runtime.model_validate(runtime)
    )


def outcome(handle: Handle) -> object:
    try:
        return handle.result(LONG_S)
    except MillstreamError as error:
        return error


def serves(mill: Mill) -> bool:
    """Whether a new client's call is answered."""
    with Client(mill.server.url) as newcomer:
        try:
            return newcomer.submit(SERVICE, ["new"], timeout=1.0).result() == ["new"]
        except MillstreamError:
            return False


def test_after_flushall_new_calls_work_within_seconds_and_who_waited_is_told(
    tmp_path: Path, server_binary: Path
) -> None:
    with milling(tmp_path, server_binary, workers=2, forward_s=0.5, batch_size=1) as mill:
        waiting = [mill.client.submit(SERVICE, [f"{number}"], timeout=4.0) for number in range(20)]
        eventually(lambda: mill.watch.held())

        mill.connection.client.flushall()

        eventually(lambda: serves(mill), within_s=HEALED_S)
        lost = [each for each in map(outcome, waiting) if isinstance(each, MillstreamError)]
        assert len(lost) >= 16
        assert {type(each) for each in lost} == {DeadlineExceeded}
        assert all("the server was emptied and has lost the job" in str(each) for each in lost)
        (view,) = Inspector(mill.connection).services()
        assert {each.consumer for each in view.workers} == set(mill.watch.live())
        assert len(view.workers) == 2
        assert mill.connection.client.hget(mill.queue.keys.spec(), "fingerprint") is not None
        assert mill.supervisor.restarts == 0


def test_a_server_that_comes_back_without_its_data_is_served_again(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary) as mill:
        os.kill(mill.server.pid, signal.SIGKILL)
        eventually(lambda: not mill.server.alive())
        for left in mill.server.data_dir.glob("appendonly*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        mill.server.restart()

        eventually(lambda: serves(mill), within_s=2 * HEALED_S)
        assert Registry(mill.connection).read(SERVICE) == mill.spec
        assert mill.supervisor.restarts == 0


def test_a_supervisor_whose_worker_died_with_the_keys_starts_the_next_one(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary) as mill:
        mill.connection.client.flushall()
        os.kill(mill.supervisor.pids[0], signal.SIGKILL)

        eventually(lambda: serves(mill), within_s=LONG_S)
        assert not mill.supervisor.refusals()


def test_what_was_pushed_last_is_what_comes_back(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, batch_size=32) as mill:
        changed = mill.spec.model_copy(update={"runtime": mill.spec.runtime.model_copy(update={"batch_size": 7})})
        Registry(mill.connection).push([changed], replace=True)
        mill.beaten()

        mill.connection.client.flushall()

        eventually(lambda: serves(mill), within_s=HEALED_S)
        assert Registry(mill.connection).read(SERVICE).runtime.batch_size == 7


def test_workers_and_supervisor_ask_an_emptied_server_without_haste(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary) as mill:
        mill.connection.client.flushall()
        eventually(lambda: serves(mill), within_s=HEALED_S)
        eventually(lambda: len(mill.watch.live()) == 1)
        (consumer,) = mill.watch.live()

        mill.beaten_by(consumer)
        before = asked(mill)
        for _ in range(3):
            mill.beaten_by(consumer)

        # A beat, a reclaim pass, a claim and a sleep a second each.
        assert asked(mill) - before < 30
        for priority in PRIORITIES:
            (group,) = mill.connection.client.xinfo_groups(mill.queue.keys.stream(priority))
            assert group["name"] == GROUP.encode()


def asked(mill: Mill) -> int:
    """Scripts and reads that workers asked for so far, by what the server counts."""
    stats = cast(dict[str, dict[str, int]], mill.connection.client.info("commandstats"))
    names = ("evalsha", "xreadgroup", "xgroup|create")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in names)


# -- what a holder writes, and what it leaves alone ----------------------------------------------------------------


@pytest.fixture
def registry(connection: Connection) -> Iterator[Registry]:
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    yield Registry(connection, prefix)
    connection.client.unlink(prefix, *connection.client.scan_iter(f"{prefix}*", count=1000))


def empty(registry: Registry, connection: Connection) -> None:
    connection.client.unlink(registry.keys(SERVICE).spec(), registry.keys("x").spec().partition("{")[0] + "services")


def test_only_a_service_that_is_registered_no_more_is_written(registry: Registry, connection: Connection) -> None:
    registry.push([spec(batch_size=1)])
    old = Registration(registry, spec(batch_size=1))
    assert old.keep() is False

    empty(registry, connection)
    registry.push([spec(batch_size=2)])

    assert old.keep() is False
    assert registry.restore(SERVICE, registry.record(SERVICE) or {}) is False
    assert registry.read(SERVICE).runtime.batch_size == 2


def test_of_two_holders_of_different_files_the_one_that_saw_the_last_push_agrees_with_the_other(
    registry: Registry, connection: Connection
) -> None:
    old, new = (Registration(registry, spec(batch_size=size)) for size in (1, 2))
    registry.push([spec(batch_size=2)])
    assert (old.keep(), new.keep()) == (False, False)

    empty(registry, connection)

    assert (old.keep(), new.keep()) == (True, False)
    assert registry.read(SERVICE).runtime.batch_size == 2
    assert registry.names() == [SERVICE]


def test_the_record_comes_back_whole_with_what_a_newer_version_added(
    registry: Registry, connection: Connection
) -> None:
    registry.push([spec(max_queue_size=3)])
    key = registry.keys(SERVICE).spec()
    connection.client.hset(key, mapping={"fingerprint": "weights", "newer": "1"})
    before = cast(dict[bytes, bytes], connection.client.hgetall(key))
    holder = Registration(registry, spec())
    holder.keep()

    empty(registry, connection)
    assert holder.keep()

    after = cast(dict[bytes, bytes], connection.client.hgetall(key))
    assert after.pop(b"token") != before.pop(b"token")
    assert int(after.pop(b"revision")) > int(before.pop(b"revision"))
    assert after == before


def test_a_service_that_is_missing_in_the_list_alone_is_listed_again(
    registry: Registry, connection: Connection
) -> None:
    registry.push([spec()])
    holder = Registration(registry, spec())

    connection.client.unlink(registry.keys("x").spec().partition("{")[0] + "services")
    holder.keep()

    assert registry.names() == [SERVICE]


def test_a_holder_that_may_not_register_says_so_once_and_goes_on(
    registry: Registry, connection: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from redis.exceptions import NoPermissionError

    registrar = Registrar(registry, [spec()])

    def refuse(*_: object, **__: object) -> None:
        raise NoPermissionError("this user has no permissions to run the 'sadd' command")

    monkeypatch.setattr(connection.client, "sadd", refuse)
    with caplog.at_level(logging.ERROR):
        registrar.look()
        registrar.look()

    (line,) = caplog.messages
    assert "cannot be registered again from here" in line
    assert "millstream config push" in line
    with pytest.raises(UnknownService):
        registry.read(SERVICE)


def test_a_program_that_serves_without_a_supervisor_registers_its_service_again(
    tmp_path: Path, server_binary: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text("from millstream.worker import serve\nserve(lambda payloads: payloads, 'alone', batch_size=3)\n")
    with EmbeddedServer.start(tmp_path / "data", binary=server_binary) as server:
        connection = Connection(server.url, name="tests")
        process = subprocess.Popen([sys.executable, program], env={**os.environ, "MILLSTREAM_REDIS_URL": server.url})
        try:
            eventually(lambda: answers(server.url, "alone"), within_s=LONG_S)

            connection.client.flushall()

            eventually(lambda: answers(server.url, "alone"), within_s=HEALED_S)
            assert Registry(connection).read("alone").runtime.batch_size == 3
        finally:
            process.terminate()
            process.wait()
            connection.close()


def answers(url: str, service: str) -> bool:
    with Client(url) as newcomer:
        try:
            return bool(newcomer.call(service, {"n": 1}, timeout=1.0) == {"n": 1})
        except MillstreamError:
            return False
