"""Routes on a real server: shares, sticky callers, pinned versions, live changes, and no cost without a route."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from routed import ANSWERS, routing, version_spec
from support import eventually
from workers import LONG_S, remove, working

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, ModelFailed, UnknownService
from millstream.broker.contract.operations import CALL
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.routes import Routes
from millstream.broker.roles import Role, rules
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.calling import find_service
from millstream.cli.main import main
from millstream.cli.server import find_server
from millstream.client import AsyncClient, Client
from millstream.client.bulk.manifest import read_manifest
from millstream.client.call_options import CallOptions
from millstream.client.known import KnownRoute
from millstream.client.result import Values
from millstream.client.services import Services
from millstream.client.version_choice import Caller
from millstream.worker.supervision.supervisor import Supervisor

ROWS = [f"row {at}" for at in range(3_000)]


@pytest.fixture(scope="module")
def versions(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Two versions of a custom service, each with a worker."""
    name, folder = f"routed-{uuid.uuid4().hex[:8]}", tmp_path_factory.mktemp("code")
    (folder / "answers.py").write_text(ANSWERS)
    specs = [version_spec(name, version) for version in ("v1", "v2")]
    with working(server.url, *specs, folder=folder):
        yield {"v1": specs[0].name, "v2": specs[1].name}
    for each in specs:
        remove(server.url, each.name)


@pytest.fixture
def other(
    server: EmbeddedServer, connection: Connection, tmp_path: Path
) -> Iterator[Callable[..., AbstractContextManager[Supervisor]]]:
    """Runs a worker of one more service with the code `answers:HANDLER`."""
    (tmp_path / "answers.py").write_text(ANSWERS)
    names = set()

    def run(spec: ServiceSpec) -> AbstractContextManager[Supervisor]:
        names.add(spec.name)
        return working(server.url, spec, folder=tmp_path)

    yield run
    for name in names:
        remove(server.url, name)


@pytest.fixture
def routes(connection: Connection) -> Routes:
    return Routes(connection)


@pytest.fixture
def route(connection: Connection, versions: Mapping[str, str]) -> Iterator[Callable[..., str]]:
    """Makes a route of the two versions. Returns its name."""
    with ExitStack() as made:

        def make(v1: float, v2: float, **settings: object) -> str:
            return made.enter_context(routing(connection, v1=v1, v2=v2, **{"services": versions, **settings}))  # type: ignore[arg-type]

        yield make


def version_of(client: Client, service: str, **who: str) -> str:
    return cast(Values, client.submit(service, ["a"], timeout=LONG_S, **who).result()).version  # type: ignore[arg-type]


def test_calls_are_shared_by_weight_and_each_result_names_its_version(
    client: Client, route: Callable[..., str]
) -> None:
    name = route(90, 10)

    handles = [client.submit(name, ["a"], timeout=LONG_S) for _ in range(1_000)]
    found = Counter(cast(Values, handle.result()).version for handle in handles)

    # Four standard deviations of a binomial distribution around 100.
    assert 62 <= found["v2"] <= 138
    assert found.total() == 1_000
    assert {handle.service.partition("@")[2] for handle in handles} == {"v1", "v2"}


def test_a_tenant_keeps_its_version_and_a_pinned_call_gets_the_one_it_names(
    client: Client, route: Callable[..., str]
) -> None:
    name = route(50, 50, sticky="tenant")

    first = {tenant: version_of(client, name, tenant=tenant) for tenant in map(str, range(20))}

    assert set(first.values()) == {"v1", "v2"}
    assert {tenant: version_of(client, name, tenant=tenant) for tenant in first} == first
    assert {version_of(client, name, tenant=tenant, version="v2") for tenant in first} == {"v2"}
    with pytest.raises(InvalidRequest, match="has no version 'v9'"):
        version_of(client, name, version="v9")


def test_a_callers_own_key_keeps_its_version(client: Client, route: Callable[..., str]) -> None:
    name = route(50, 50, sticky="key")

    first = {key: version_of(client, name, sticky_key=key) for key in map(str, range(20))}

    assert set(first.values()) == {"v1", "v2"}
    assert {key: version_of(client, name, sticky_key=key) for key in first} == first


def test_a_service_without_a_route_has_no_versions(client: Client, versions: Mapping[str, str]) -> None:
    assert version_of(client, versions["v1"]) == ""
    with pytest.raises(InvalidRequest, match="it has no route"):
        version_of(client, versions["v1"], version="v1")


def test_a_name_that_is_neither_a_service_nor_a_route_is_unknown(client: Client) -> None:
    with pytest.raises(UnknownService):
        version_of(client, "no-such-route")


def test_the_async_client_chooses_pins_and_names_versions(server: EmbeddedServer, route: Callable[..., str]) -> None:
    name = route(50, 50)

    async def call() -> tuple[set[str], str]:
        async with AsyncClient(server.url) as client:
            handles = [await client.submit(name, ["a"], timeout=LONG_S) for _ in range(50)]
            found = {cast(Values, await handle).version for handle in handles}
            pinned = cast(Values, await (await client.submit(name, ["a"], timeout=LONG_S, version="v2")))
            return found, pinned.version

    assert asyncio.run(call()) == ({"v1", "v2"}, "v2")


def test_no_call_mixes_versions_while_the_weights_change(
    client: Client, route: Callable[..., str], routes: Routes
) -> None:
    name, over = route(100, 0), threading.Event()

    def change() -> None:
        weights = [{"v1": 100.0, "v2": 0.0}, {"v1": 0.0, "v2": 100.0}]
        while not over.is_set():
            weights.reverse()
            routes.change(name, lambda standing: standing.weighted(weights[0]))
            over.wait(0.37)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        found: set[str] = set()

        def answered() -> bool:
            handle = client.submit(name, list(ROWS))
            result = cast(Values, handle.result(LONG_S))
            assert result == [result.version] * len(ROWS)
            found.add(result.version)
            return found == {"v1", "v2"}

        eventually(answered, within_s=LONG_S)
    finally:
        over.set()
        changer.join(LONG_S)


def test_a_map_goes_to_one_version(client: Client, route: Callable[..., str], routes: Routes) -> None:
    name = route(100, 0)
    rows = client.map(name, iter(ROWS), window=64)

    assert next(rows) == "v1"
    routes.change(name, lambda standing: standing.weighted({"v1": 0.0, "v2": 1.0}))
    eventually(lambda: version_of(client, name) == "v2", within_s=LONG_S)

    assert set(rows) == {"v1"}


def test_an_idempotency_key_keeps_its_version_over_a_change_of_weights(
    client: Client, server: EmbeddedServer, route: Callable[..., str], routes: Routes
) -> None:
    name = route(100, 0)
    first = client.submit_detached(name, ["a"], idempotency_key="once")
    routes.change(name, lambda standing: standing.weighted({"v1": 0.0, "v2": 100.0}))

    with Client(server.url) as other:
        again = other.submit_detached(name, ["a"], idempotency_key="once")
        fresh = other.submit_detached(name, ["a"], idempotency_key="another")

        assert again.id == first.id
        assert fresh.id.startswith(f"{routes.read(name).services['v2']}:")
        assert again.result(LONG_S) == ["v1"]
        with pytest.raises(InvalidRequest, match="used for version 'v1'"):
            other.submit_detached(name, ["a"], idempotency_key="once", version="v2")


def test_a_bulk_run_stays_with_its_version(
    client: Client, route: Callable[..., str], routes: Routes, tmp_path: Path
) -> None:
    name = route(100, 0)
    source = tmp_path / "rows.txt"
    source.write_text("\n".join(ROWS[:50]))

    client.bulk(name, source, tmp_path / "out", version="v2")
    routes.change(name, lambda standing: standing.weighted({"v1": 1.0, "v2": 0.0}))

    again = client.bulk(name, source, tmp_path / "out")
    assert (again.rows, again.failed) == (50, 0)
    assert read_manifest(tmp_path / "out")[0].header.service == routes.read(name).services["v2"]  # type: ignore[union-attr]


def test_a_second_push_keeps_live_weights_and_replace_takes_the_files(
    route: Callable[..., str], routes: Routes
) -> None:
    name = route(90, 10)
    written = routes.read(name)
    routes.change(name, lambda standing: standing.weighted({"v1": 50.0, "v2": 50.0}))

    assert routes.push([written]) == ([], [name])
    assert routes.read(name).weights == {"v1": 50, "v2": 50}
    assert routes.read(name).previous == {"v1": 90, "v2": 10}
    assert routes.push([written], replace=True) == ([name], [])
    assert routes.read(name).weights == {"v1": 90, "v2": 10}
    assert routes.push([written]) == ([], [])


def test_a_service_without_a_route_costs_no_further_command(
    server: EmbeddedServer, versions: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    with ExitStack() as ends:
        connection = Connection(server.url, name="counted")
        ends.callback(connection.close)
        client = ends.enter_context(Client(server.url))
        services: Services = client._calls.services
        execute = client._calls.connection.client.execute_command

        def counted(*words: object, **options: object) -> object:
            sent.append(str(words[0]))
            return execute(*words, **options)  # type: ignore[no-untyped-call]

        monkeypatch.setattr(client._calls.connection.client, "execute_command", counted)
        services.read_target(versions["v1"])

    # The service with its route, the clock and the heartbeats of its workers, the pause.
    assert Counter(sent)["HMGET"] == 1
    assert not {"SMEMBERS", "HGET", "HGETALL"} & set(sent)


def test_the_command_shows_sets_promotes_and_takes_back(
    server: EmbeddedServer, client: Client, route: Callable[..., str]
) -> None:
    name = route(90, 10)

    def run(*words: str) -> str:
        result = CliRunner().invoke(main, ["route", *words, "--url", server.url])
        assert result.exit_code == 0, result.output
        return result.output

    version_of(client, name, version="v2")
    assert "v2 25.0%" in run("set", name, "v1=75", "v2=25")
    (shown,) = json.loads(run("show", name, "--json"))
    first, second = shown["versions"]
    assert (first["weight"], second["weight"], second["share"]) == (75, 25, 0.25)
    assert first["workers"] == second["workers"] == 1
    assert second["ok"] >= 1
    assert "v1 0.0%, v2 100.0%" in run("promote", name, "v2")
    eventually(lambda: version_of(client, name) == "v2", within_s=LONG_S)
    assert "v1 75.0%" in run("rollback", name)
    assert f"{name}: sticky none, fallback none" in run("show")


def test_the_command_refuses_what_would_send_calls_nowhere(server: EmbeddedServer, route: Callable[..., str]) -> None:
    name = route(90, 10)

    def failing(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["route", *words, "--url", server.url])
        return result.exit_code, result.output

    assert failing("set", name, "v2=25") == (2, f"millstream: {NAME_ALL.format(name)}\n")
    assert failing("set", name, "v1=1", "v2=1", "v3=1")[0] == 4
    assert failing("promote", "no-such-route", "v2")[0] == 4
    assert failing("set", name, "v2")[0] == 2
    assert failing("rollback", name)[0] == 2


NAME_ALL = "route {!r} has other versions with a weight (name them too: v1=90)"


# -- fallback ------------------------------------------------------------------------------------------------------


def test_a_broken_version_fails_no_call_of_a_route_with_a_fallback(
    client: Client, route: Callable[..., str], versions: Mapping[str, str], other: Callable[..., Any]
) -> None:
    spec = version_spec(f"other-{uuid.uuid4().hex[:8]}", "broken")
    with other(spec):
        name = route(0, 100, services={"v1": versions["v1"], "v2": spec.name}, fallback="v1")

        result = cast(Values, client.submit(name, list(ROWS), timeout=LONG_S).result())

        assert result == ["v1"] * len(ROWS)
        assert result.version == "v1"
        with pytest.raises(ModelFailed):
            client.submit(name, ["a"], version="v2").result(LONG_S)
        assert asyncio.run(_call_async(client, name)) == ("v1", ["v1"])


async def _call_async(client: Client, name: str) -> tuple[str, list[object]]:
    async with AsyncClient(client._calls.connection.url) as other:
        result = cast(Values, await (await other.submit(name, ["a"], timeout=LONG_S)))
        return result.version, list(result)


def test_a_full_queue_is_left_for_the_fallback(
    client: Client, connection: Connection, route: Callable[..., str], versions: Mapping[str, str]
) -> None:
    # Chosen by hand: a route sends no calls to a version of which no worker lives.
    spec = version_spec(f"other-{uuid.uuid4().hex[:8]}", "v2", max_queue_size=1)
    Registry(connection).push([spec])
    name = route(1, 0, services={"v1": versions["v1"], "v2": spec.name}, fallback="v1")
    try:
        client.submit(spec.name, ["fills the queue"])
        eventually(lambda: sum(client.stats(spec.name).sizes.values()) == 1, within_s=LONG_S)
        services = client._calls.services
        target = cast(KnownRoute, services.read_target(name))
        chosen = services.choose(target, Caller(version="v2"))._replace(
            fallback=services.choose(target, Caller(version="v1"))
        )

        handle = client._calls.begin(chosen, ["a"], CallOptions())

        assert handle.result(LONG_S) == ["v1"]
        assert handle.version == "v1"
    finally:
        remove(client._calls.connection.url, spec.name)


def test_killed_workers_fail_no_call_and_get_calls_again_when_they_are_back(
    client: Client, route: Callable[..., str], versions: Mapping[str, str], other: Callable[..., Any]
) -> None:
    spec = version_spec(f"other-{uuid.uuid4().hex[:8]}", "slow")
    found: list[str] = []
    failed: list[Exception] = []
    over = threading.Event()

    def call() -> None:
        while not over.is_set():
            try:
                result = cast(Values, client.submit(name, ["a"] * 20).result(LONG_S))
                assert list(result) == [result.version] * 20
                found.append(result.version)
            except Exception as error:  # noqa: BLE001 - each is a failed call
                failed.append(error)

    name = ""
    threads = [threading.Thread(target=call) for _ in range(8)]
    try:
        with other(spec) as supervisor:
            name = route(50, 50, services={"v1": versions["v1"], "v2": spec.name}, fallback="v1")
            for thread in threads:
                thread.start()
            eventually(lambda: {"v1", "v2"} <= set(found), within_s=LONG_S)
            inspector = Inspector(client._calls.connection)
            (view,) = inspector.services([spec.name])
            supervisor.stop()
            for worker in view.workers:
                os.kill(worker.pid, signal.SIGKILL)
        seen = len(found)
        eventually(lambda: found[seen:].count("v1") > 500 and "v2" not in found[-200:], within_s=LONG_S)
        with other(spec):
            seen = len(found)
            eventually(lambda: "v2" in found[seen:], within_s=LONG_S)
            over.set()
            for thread in threads:
                thread.join(LONG_S)
    finally:
        over.set()

    assert failed == []


def test_no_version_without_a_worker_is_promoted_but_by_force(
    server: EmbeddedServer, connection: Connection, route: Callable[..., str], versions: Mapping[str, str]
) -> None:
    spec = version_spec(f"other-{uuid.uuid4().hex[:8]}", "v2")
    Registry(connection).push([spec])
    name = route(1, 0, services={"v1": versions["v1"], "v2": spec.name})
    try:
        refused = CliRunner().invoke(main, ["route", "promote", name, "v2", "--url", server.url])
        forced = CliRunner().invoke(main, ["route", "promote", name, "v2", "--force", "--url", server.url])

        assert refused.exit_code == 6
        assert "--force" in refused.output
        assert forced.exit_code == 0
    finally:
        remove(server.url, spec.name)


def test_a_command_calls_a_route(server: EmbeddedServer, route: Callable[..., str]) -> None:
    target, name = find_server(server.url, None), route(50, 50)

    found = find_service(target.url, target.prefix, name, CALL, lambda operation: True, wait_s=LONG_S)

    assert found == name


def test_users_of_the_roles_call_show_and_change_a_route(
    server: EmbeddedServer, connection: Connection, route: Callable[..., str]
) -> None:
    name, users = route(100, 0), []

    def login(role: Role) -> str:
        users.append(f"{role}-{uuid.uuid4().hex[:8]}")
        version = tuple(map(int, connection.client.info("server")["redis_version"].split(".")))
        given = ["ACL", "SETUSER", users[-1], "nopass", *rules(role, version)]
        connection.client.execute_command(*given)  # type: ignore[no-untyped-call]
        return f"{server.url}?username={users[-1]}&password=any"

    def run(url: str, *words: str) -> int:
        return CliRunner().invoke(main, ["route", *words, "--url", url]).exit_code

    try:
        viewer, admin = login("viewer"), login("admin")
        with Client(login("client")) as client:
            assert version_of(client, name) == "v1"
            detached = client.submit_detached(name, ["a"], idempotency_key="as a user")
            assert detached.result(LONG_S) == ["v1"]
        assert run(viewer, "show", name) == run(viewer, "show") == 0
        assert run(viewer, "promote", name, "v2") != 0
        assert run(admin, "promote", name, "v2") == 0
    finally:
        for user in users:
            connection.client.acl_deluser(user)
