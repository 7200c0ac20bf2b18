"""A master under Sentinel, and `durability: replicated`: what was accepted outlives the master."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from contracts.queue import Queue, draft
from integration.topologies import check_commands
from support import eventually
from topologies import MASTER_NAME, Node, Topology, sentinel
from workers import spec, working

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import BrokerUnavailable
from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.stream_types import Admission, Group
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.connection import Connection, check, is_transient, translated
from millstream.client import Client

GAP_S = 60.0
"""Longer than any failover takes on a loaded machine."""

FLOWING = 30


def replicated(name: str) -> ServiceSpec:
    return spec(name, max_queue_size=5_000).model_copy(update={"replicated": True})


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Topology]:
    """Whose master may change."""
    with sentinel(tmp_path / "servers") as running:
        yield running


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    """Left by each test as it was."""
    with sentinel(tmp_path_factory.mktemp("steady")) as running:
        yield running


@contextmanager
def frozen(nodes: Sequence[Node]) -> Iterator[None]:
    for node in nodes:
        node.freeze()
    try:
        yield
    finally:
        for node in nodes:
            node.thaw()


class Callers:
    """Threads that each make a call, keep its answer beside what it should be, and start over."""

    def __init__(self, client: Client, service: str, threads: int) -> None:
        self.wrong: list[object] = []
        self.answered = 0
        self._client = client
        self._service = service
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(threads)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def flow(self) -> None:
        """Wait for answers to calls that begin now."""
        enough = self.answered + FLOWING
        eventually(lambda: self.answered >= enough or self.wrong, within_s=GAP_S)

    def _call(self, seed: int) -> None:
        while not self._over.is_set():
            texts = [f"text {seed} {self.answered}"]
            try:
                answer: object = self._client.submit(self._service, texts, timeout=GAP_S).result()
            except Exception as error:  # noqa: BLE001 - the test's own thread looks at it
                answer = error
            if answer != texts:
                self.wrong.append(answer)
            self.answered += 1


def test_accepted_jobs_outlive_a_master_that_is_killed_and_calls_wait_for_the_next(servers: Topology) -> None:
    with working(servers.url, replicated("mill")), Client(servers.url) as client:
        with Callers(client, "mill", threads=4) as callers:
            callers.flow()
            accepted = [client.submit_detached("mill", [f"kept {n}"]).id for n in range(50)]
            old = servers.kill_master()
            # Accepted by the next master, which these wait for.
            accepted += [client.submit_detached("mill", [f"kept {n}"]).id for n in range(50, 60)]
            callers.flow()

        assert servers.master() is not old
        assert callers.wrong == []
        assert [client.job(each).result(timeout=30) for each in accepted] == [[f"kept {n}"] for n in range(60)]


def test_what_no_replica_has_when_the_master_dies_was_not_accepted(servers: Topology) -> None:
    replicas = servers.replicas()
    accepted: list[str] = []
    with working(servers.url, replicated("mill")), Client(servers.url) as client:
        with frozen(replicas):
            # What the kernel holds for a frozen process would still reach it: the link is cut, too.
            servers.master().ask("CLIENT", "KILL", "TYPE", "replica")
            caller = threading.Thread(
                target=lambda: accepted.append(client.submit_detached("mill", ["kept"], timeout=GAP_S).id)
            )
            caller.start()
            eventually(partial(_was_added, servers.master(), "mill"))
            servers.kill_master()
        caller.join()

        assert servers.master() in replicas
        assert client.job(accepted[0]).result(timeout=30) == ["kept"]


def test_nothing_is_accepted_while_all_replicas_are_stopped_and_all_is_when_they_are_back(steady: Topology) -> None:
    with working(steady.url, replicated("mill")), Client(steady.url) as client:
        with (
            frozen(steady.replicas()),
            pytest.raises(BrokerUnavailable, match="no replica confirmed within 500 ms") as caught,
        ):
            client.submit_detached("mill", ["again"], timeout=1.5, idempotency_key="again")
        assert is_transient(caught.value)

        job = client.submit_detached("mill", ["again"], timeout=GAP_S, idempotency_key="again")

        assert job.result(timeout=30) == ["again"]


def test_a_repeat_over_another_connection_waits_for_a_replica_too(steady: Topology) -> None:
    keys = ServiceKeys("repeated")
    group = Group(Priority.NORMAL, [draft()], replicated=True)
    connections = [Connection(steady.url) for _ in range(3)]
    first, second, third = (Queue(each.client, keys).streams for each in connections)
    Queue(connections[0].client, keys).open()

    with frozen(steady.replicas()):
        for streams in (first, second):
            with pytest.raises(BrokerUnavailable, match="no replica confirmed"):
                streams.enqueue([group])
    assert third.enqueue([group]) == [Admission()]

    assert connections[0].client.xlen(keys.stream(Priority.NORMAL)) == 1
    for each in connections:
        each.close()


def test_jobs_that_are_refused_wait_for_no_replica(steady: Topology) -> None:
    connection = Connection(steady.url)
    streams = Streams(connection.client, ServiceKeys("unheard-of"))

    with frozen(steady.replicas()):
        # Else there would be nothing of this connection's that a replica has not.
        connection.client.set(ServiceKeys("unheard-of").reclaim(), "", ex=60)
        refused = streams.enqueue([Group(Priority.NORMAL, [draft()], replicated=True)])
    connection.close()

    assert refused == [Admission("unknown_service")]


def test_a_url_is_enough_to_know_that_a_service_is_replicated(steady: Topology) -> None:
    specs = replicated("safe"), spec("quick")
    with working(steady.url, *specs), Client(steady.url) as client, frozen(steady.replicas()):
        assert client.submit_detached("quick", ["unasked"], timeout=5.0).result(timeout=30) == ["unasked"]
        with pytest.raises(BrokerUnavailable, match="no replica confirmed"):
            client.submit_detached("safe", ["asked"], timeout=1.0)


def test_a_planned_failover_loses_nothing_and_nobody_is_told(servers: Topology) -> None:
    with working(servers.url, spec("mill")), Client(servers.url) as client:
        with Callers(client, "mill", threads=4) as callers:
            callers.flow()
            accepted = [client.submit_detached("mill", [f"kept {n}"]).id for n in range(50)]
            servers.fail_over()
            callers.flow()

        assert callers.wrong == []
        assert [client.job(each).result(timeout=30) for each in accepted] == [[f"kept {n}"] for n in range(50)]


def test_while_no_master_is_known_the_server_is_away_for_a_time(steady: Topology) -> None:
    lone = Connection(steady.url.replace(f"/{MASTER_NAME}", "/unheard-of"))

    with pytest.raises(BrokerUnavailable, match="has no master at the moment") as caught:
        check(lone)
    lone.close()

    assert is_transient(caught.value)
    assert "master's name in the URL" in caught.value.hint


def test_the_command_line_works_on_a_master_under_sentinel(steady: Topology, tmp_path: Path) -> None:
    with working(steady.url, spec("operated")):
        check_commands(tmp_path, steady.url, "operated")


def test_a_cluster_url_of_a_server_that_is_none_says_so(steady: Topology) -> None:
    mistaken = Connection(f"redis+cluster://127.0.0.1:{steady.master().port}")

    with pytest.raises(BrokerUnavailable, match="is no cluster") as caught:
        check(mistaken)
    mistaken.close()

    assert not is_transient(caught.value)
    assert "say redis://" in caught.value.hint


def test_sentinels_that_are_gone_are_passed_over(steady: Topology) -> None:
    gone = steady.sentinels[:2]
    for watcher in gone:
        watcher.kill()
    connection = Connection(steady.url)

    try:
        with translated(connection.safe_url):
            assert connection.client.ping()
    finally:
        connection.close()
        for watcher in gone:
            watcher.start()


def _was_added(node: Node, service: str) -> bool:
    """Whether a job of a detached call ever came to the server, waiting or settled."""
    info = node.client.xinfo_stream(ServiceKeys(service).stream(Priority.BATCH))
    return bool(info["last-generated-id"] != b"0-0")
