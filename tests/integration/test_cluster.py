"""Services in a Redis Cluster: each in a slot of its own, which may move to another node at any time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from e2e import ledger
from integration.topologies import check_commands
from receivers import SECRET, Receiver, receiving
from support import eventually
from topologies import Node, Topology, cluster
from workers import spec, working

from millstream.broker.config.webhooks import WebhookSettings
from millstream.broker.contract.errors import BrokerUnavailable, ConfigError
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, check, translated
from millstream.client import Client
from millstream.worker.supervision.webhook_sender import sending

SERVICES = ["one", "two", "three"]
FLOWING = 60
"""So many answers say that jobs flow."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    with cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def worked(servers: Topology) -> Iterator[Topology]:
    """With a worker for each of SERVICES, which lie on different nodes."""
    with working(servers.url, *(spec(name, max_queue_size=2_000) for name in SERVICES)):
        yield servers


@pytest.fixture
def connection(servers: Topology) -> Iterator[Connection]:
    opened = Connection(servers.url, name="tests")
    yield opened
    opened.close()


def test_services_on_different_nodes_are_called_through_one_client(worked: Topology) -> None:
    # Other tests move them, and end nodes.
    if len({worked.owner(name).port for name in SERVICES}) == 1:
        worked.move_slot(SERVICES[0])

    with Client(worked.url) as client:
        handles = [client.submit(name, [f"{name} {n}"]) for n in range(20) for name in SERVICES]

        assert [handle.result(timeout=30) for handle in handles] == [
            [f"{name} {n}"] for n in range(20) for name in SERVICES
        ]


def test_tenants_share_the_claims_of_a_service(servers: Topology) -> None:
    with working(servers.url, spec("fair", batch_size=4, fair={"max_in_flight": 8})), Client(servers.url) as client:
        handles = [client.submit("fair", [f"{n}"], tenant="ab"[n % 2]) for n in range(60)]
        client.submit_detached("fair", ["x"], tenant="c").cancel()

        assert [handle.result(timeout=30) for handle in handles] == [[f"{n}"] for n in range(60)]


def test_detached_calls_are_kept_where_their_service_is(worked: Topology) -> None:
    with Client(worked.url) as client:
        ids = [client.submit_detached(name, [name], idempotency_key="once").id for name in SERVICES * 2]

        assert [client.job(each).result(timeout=30) for each in ids] == [[name] for name in SERVICES * 2]
        assert len(set(ids)) == len(SERVICES)


def test_webhooks_of_services_on_different_nodes_are_sent_by_one_sender(
    servers: Topology, connection: Connection, tmp_path: Path
) -> None:
    names, file = [f"hooked-{number}" for number in range(4)], tmp_path / "secret"
    file.write_text(SECRET)
    with receiving(Receiver()) as receiver, Client(servers.url) as client:
        settings = WebhookSettings(allow=(receiver.url(""),), secret_file=file)
        Registry(connection).push([spec(name).model_copy(update={"webhooks": settings.allow}) for name in names])
        calls = [client.submit_detached(name, ["a"], webhook=receiver.url()) for name in names]
        for call in calls:
            assert call.cancel()
        with sending(servers.url, "ms", names, settings):
            eventually(lambda: len(receiver.requests) >= len(calls))

    assert sorted(outcome.id for outcome in receiver.outcomes) == sorted(call.id for call in calls)


def test_one_look_shows_the_services_of_all_nodes(worked: Topology, connection: Connection) -> None:
    views = {view.name: view for view in Inspector(connection).services()}

    assert views.keys() >= set(SERVICES)
    assert [len(views[name].workers) for name in SERVICES] == [1, 1, 1]


def test_a_push_is_refused_or_replaces_as_on_one_server(servers: Topology, connection: Connection) -> None:
    registry = Registry(connection)
    registry.push([spec("pushed", batch_size=8)])

    with pytest.raises(ConfigError, match=r"runtime.batch_size is 8, here 16"):
        registry.push([spec("pushed", batch_size=16)])
    registry.push([spec("pushed", batch_size=16)], replace=True)

    assert registry.read("pushed").runtime.batch_size == 16
    assert "pushed" in registry.names()


def test_the_command_line_works_on_a_cluster(worked: Topology, tmp_path: Path) -> None:
    check_commands(tmp_path, worked.url, SERVICES[0])


def test_every_node_is_asked_what_it_is(servers: Topology, connection: Connection) -> None:
    before = [_times_asked_info(node.client.info("commandstats")) for node in servers.nodes]

    check(connection)

    after = [_times_asked_info(node.client.info("commandstats")) for node in servers.nodes]
    assert [late - early for early, late in zip(before, after, strict=True)] == [3, 3, 3]  # with the one above


def test_a_cold_script_cache_is_filled_on_the_node_that_has_the_keys(worked: Topology) -> None:
    with Client(worked.url) as client:
        for node in worked.nodes:
            node.ask("SCRIPT", "FLUSH")

        assert [client.submit(name, [name]).result(timeout=30) for name in SERVICES] == [[name] for name in SERVICES]


def test_a_slot_that_moves_under_load_loses_and_doubles_nothing(worked: Topology, connection: Connection) -> None:
    service = SERVICES[0]
    keys = Registry(connection).keys(service)
    with ledger.opened(connection, keys, "echo") as sent:
        calls = ledger.Load(sent, [f"text {n}" for n in range(50)], threads=4)
        calls.start()
        try:
            owners = {worked.owner(service)}
            for _ in range(3):
                eventually(partial(sent.has_answered, sent.answered + FLOWING), within_s=30.0)
                owners.add(worked.move_slot(service, per_step=1))
            eventually(partial(sent.has_answered, sent.answered + FLOWING), within_s=30.0)
        finally:
            calls.stop()

    assert len(owners) > 1
    assert sent.replies.keys() == sent.sent.keys()
    assert sent.answered_more_than_once() == []
    assert [job for job, (reply,) in sent.replies.items() if reply.values != sent.sent[job]] == []


def test_calls_go_on_while_the_slot_of_their_service_moves(worked: Topology) -> None:
    with Client(worked.url) as client:
        for _ in range(2):
            handles = [client.submit("two", [f"text {n}"]) for n in range(50)]
            worked.move_slot("two")

            assert [handle.result(timeout=30) for handle in handles] == [[f"text {n}"] for n in range(50)]
        assert client.submit("two", ["after"]).result(timeout=30) == ["after"]


def test_a_call_waits_while_the_keys_of_its_service_are_on_two_nodes(worked: Topology) -> None:
    source = worked.owner("three")
    with Client(worked.url) as client:
        assert client.submit("three", ["before"]).result(timeout=30) == ["before"]
        with worked.moving("three"):
            put_off = _refusals(source)
            handle = client.submit("three", ["meanwhile"], timeout=60)
            eventually(lambda: _refusals(source) >= put_off + 5, within_s=30.0)

        assert handle.result() == ["meanwhile"]


def test_keys_that_went_ahead_of_their_slot_are_written_and_read(servers: Topology, connection: Connection) -> None:
    key = "ms:{pushed}:ahead"
    with servers.moving("pushed") as target:
        connection.client.set(key, "here", ex=60)

        assert target.ask("CLUSTER", "COUNTKEYSINSLOT", servers.slot("pushed")) == 1
        assert connection.client.get(key) == b"here"
        pipe = connection.client.pipeline(transaction=False)
        pipe.get(key)
        pipe.exists(key)
        assert pipe.execute() == [b"here", 1]
    assert connection.client.get(key) == b"here"


def test_a_node_that_dies_is_replaced_by_its_replica_and_calls_wait_for_it(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster", replicas=1) as servers:
        doomed, *_, replica = servers.nodes
        service = next(name for name in map(str, range(1_000)) if servers.owner(name) is doomed)
        with working(servers.url, spec(service)), Client(servers.url) as client:
            assert client.submit(service, ["before"]).result(timeout=30) == ["before"]
            eventually(lambda: _offset(replica, "slave") >= _offset(doomed, "master"))

            doomed.kill()

            assert client.submit(service, ["after"], timeout=60).result() == ["after"]
            assert servers.owner(service) is replica


def test_a_url_of_one_node_is_told_to_name_the_cluster(servers: Topology) -> None:
    stranger = next(node for node in servers.masters() if node is not servers.owner("one"))
    lone = Connection(f"redis://127.0.0.1:{stranger.port}")

    with pytest.raises(BrokerUnavailable, match="is one node of a cluster") as caught:
        Registry(lone).read("one")
    lone.close()

    assert "redis+cluster://" in caught.value.hint


def test_a_cluster_without_its_nodes_is_away_and_not_an_internal_error(tmp_path: Path) -> None:
    with cluster(tmp_path / "doomed") as doomed:
        connection = Connection(doomed.url)
        assert check(connection)
        for node in doomed.nodes:
            node.kill()

        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match="cannot be reached"), translated(connection.safe_url):
                connection.client.get("ms:{one}:x")
        connection.close()


def _refusals(node: Node) -> int:
    """How often it told somebody to try again."""
    said = cast(Mapping[str, Mapping[str, int]], node.client.info("errorstats"))
    return said.get("errorstat_TRYAGAIN", {"count": 0})["count"]


def _offset(node: Node, role: str) -> int:
    """How much of its master's writing it has."""
    return int(node.replication(f"{role}_repl_offset"))


def _times_asked_info(stats: dict[str, dict[str, int]]) -> int:
    return stats["cmdstat_info"]["calls"] if "cmdstat_info" in stats else 0
