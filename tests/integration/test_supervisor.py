"""A supervisor outlives what it cannot help: children that die at once, a server that is away, keys that are broken."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from contracts.queue import Queue, draft
from support import eventually

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.worker.supervision import child
from millstream.worker.supervision import supervisor as module
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

NO_SERVER = "redis://127.0.0.1:1"


def spec(name: str) -> ServiceSpec:
    return ServiceSpec(name=name, model=ModelSpec(type="echo"), model_ref="m", runtime=Runtime())


@pytest.fixture
def stillborn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers end at once, with status 1, and the next one starts without a pause."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(module, "_FIRST_BACKOFF_S", 0.0)
    monkeypatch.setattr(module, "_LONGEST_BACKOFF_S", 0.0)


@contextmanager
def supervisor_of(url: str, *services: str, drain_s: float = 5.0) -> Iterator[Supervisor]:
    supervisor = Supervisor(url, DEFAULT_PREFIX, [Plan(spec(name), 1) for name in services], drain_s=drain_s)
    try:
        yield supervisor
    finally:
        supervisor.drain()


def step_until(supervisor: Supervisor, condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    def stepped() -> object:
        supervisor.step()
        return condition()

    eventually(stepped, within_s=within_s)


def restarted(supervisor: Supervisor, times: int) -> None:
    step_until(supervisor, lambda: supervisor.restarts >= times, within_s=60.0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.usefixtures("stillborn")
def test_a_hundred_deaths_leave_no_descriptor_and_no_zombie(server: EmbeddedServer, service: str) -> None:
    born_before = children()
    with supervisor_of(server.url, service) as supervisor:
        restarted(supervisor, 5)
        before = descriptors()

        restarted(supervisor, 105)
        after = descriptors()

    assert abs(after - before) <= 2
    assert children() == born_before


@pytest.mark.usefixtures("stillborn")
def test_what_never_was_ready_dies_young_however_long_it_lived(
    server: EmbeddedServer, service: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "STEADY_S", 0.0)

    with supervisor_of(server.url, service) as supervisor:
        restarted(supervisor, 8)

    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1


@pytest.mark.usefixtures("stillborn")
def test_without_a_server_workers_are_started_on_and_a_stop_ends_it(service: str) -> None:
    born_before = children()
    with supervisor_of(NO_SERVER, service) as supervisor:
        restarted(supervisor, 3)
        began = time.monotonic()

    assert time.monotonic() - began < 2.0
    assert children() == born_before


def test_where_no_process_can_be_made_the_next_try_waits(
    server: EmbeddedServer, service: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)

    with supervisor_of(server.url, service) as supervisor:
        supervisor.step()
        before = descriptors()
        for _ in range(20):
            supervisor.step()
        step_until(supervisor, lambda: len(caplog.records) >= 2)

        assert descriptors() == before

    assert "could not be started ([Errno 11] Resource temporarily unavailable)" in caplog.messages[0]
    assert caplog.messages[0].endswith("the next starts in 0.5 s")
    assert caplog.messages[1].endswith("the next starts in 1 s")


@pytest.mark.usefixtures("stillborn")
def test_one_services_broken_keys_keep_nobody_else_from_what_its_dead_held(
    server: EmbeddedServer, service: str, connection: Connection
) -> None:
    broken = ServiceKeys(f"broken-{uuid.uuid4().hex[:12]}")
    queue = Queue(connection.client, ServiceKeys(service))
    queue.open()
    connection.client.set(broken.streams()[0], "not a stream", ex=60)

    with supervisor_of(server.url, broken.service, service) as supervisor:
        supervisor.step()
        dying = supervisor._slots[1].child
        assert dying
        queue.hold(dying.consumer, draft())
        step_until(supervisor, lambda: not queue.held_by(dying.consumer))

    assert len(queue.held_by("returned")) == 1
