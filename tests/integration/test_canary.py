"""Canaries on a real server: promoted, rolled back with a reason, driven by one supervisor at a time."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import pytest
from click.testing import CliRunner
from routed import ANSWERS, routing, version_spec
from scrapes import exporting, fetch
from support import eventually
from workers import LONG_S, remove, working

from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue import canaries
from millstream.broker.queue.canaries import Canaries
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.routes import Routes
from millstream.broker.roles import Role, rules
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client
from millstream.client.result import Values
from millstream.worker.supervision.canary_driver import CanaryDriver

CODE = (
    ANSWERS
    + """
def failing(payloads):
    if "fail" in payloads:
        raise RuntimeError("broken")
    return ["v2"] * len(payloads)
"""
)

PLAN = ("--steps", "25,100", "--every", "100ms", "--max-p99-ratio", "1000")
"""Times are left to chance: the versions are called one after the other on a machine that runs other tests."""


@pytest.fixture(scope="module")
def versions(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Two versions of a custom service, each with a worker. v2 fails for rows that say so."""
    name, folder = f"canary-{uuid.uuid4().hex[:8]}", tmp_path_factory.mktemp("code")
    (folder / "answers.py").write_text(CODE)
    specs = [version_spec(name, version) for version in ("v1", "failing")]
    with working(server.url, *specs, folder=folder):
        yield {"v1": specs[0].name, "v2": specs[1].name}
    for each in specs:
        remove(server.url, each.name)


@pytest.fixture
def route(connection: Connection, versions: Mapping[str, str]) -> Iterator[str]:
    with routing(connection, versions, 90, 10) as name:
        yield name


@pytest.fixture
def routes(connection: Connection) -> Routes:
    return Routes(connection)


@pytest.fixture
def run(server: EmbeddedServer) -> Callable[..., str]:
    """Runs a command of `millstream route`. Returns its output."""

    def invoke(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["route", *words, "--url", server.url])
        assert done.exit_code == code, done.output
        return done.output

    return invoke


def drivers(connection: Connection, versions: Mapping[str, str]) -> CanaryDriver:
    return CanaryDriver(connection, "ms", [versions["v2"]])


def look(driver: CanaryDriver) -> bool:
    driver.look()
    return True


def call(client: Client, route: str, version: str, row: str = "a", count: int = 250) -> None:
    """Makes calls of one version, of which none or all fail."""
    handles = [client.submit(route, [row], timeout=LONG_S, version=version) for _ in range(count)]
    for handle in handles:
        if row == "fail" and version == "v2":
            with pytest.raises(ModelFailed):
                handle.result()
        else:
            handle.result()


def answered(connection: Connection, service: str) -> int:
    """How many calls the times to the answer are known of: workers add them with their next heartbeat."""
    return Metrics(connection).read(service).histograms["latency"].count


def call_both(client: Client, connection: Connection, versions: Mapping[str, str], route: str) -> None:
    before = {service: answered(connection, service) for service in versions.values()}
    for version in versions:
        call(client, route, version)
    eventually(lambda: all(answered(connection, each) >= count + 250 for each, count in before.items()))


def shares(routes: Routes, name: str) -> dict[str, float]:
    return dict(routes.read(name).weights)


def test_a_good_version_is_promoted_step_by_step(
    client: Client,
    connection: Connection,
    versions: Mapping[str, str],
    route: str,
    routes: Routes,
    run: Callable[..., str],
) -> None:
    driver = drivers(connection, versions)

    assert "v2 gets 25% of the calls" in run("canary", "start", route, "v2", *PLAN)
    assert shares(routes, route) == {"v1": 75, "v2": 25}
    driver.look()
    assert "step 1 of 2, 25% for" in run("show", route)
    call_both(client, connection, versions, route)
    driver.look()
    assert shares(routes, route) == {"v1": 0, "v2": 100}
    call_both(client, connection, versions, route)
    eventually(lambda: look(driver) and "good, it gets all calls" in run("show", route))

    assert shares(routes, route) == {"v1": 0, "v2": 100}
    with Client(connection.url) as fresh:
        assert {cast(Values, fresh.submit(route, ["a"]).result(LONG_S)).version for _ in range(20)} == {"v2"}
    (shown,) = json.loads(run("show", route, "--json"))
    assert (shown["canary"]["status"], shown["previous"]) == ("promoted", {"v1": 90, "v2": 10})
    # An operator's change ends it, from the weights in effect.
    run("rollback", route)
    assert shares(routes, route) == {"v1": 90, "v2": 10}
    assert not connection.client.exists(ServiceKeys(route).canary())


def test_errors_roll_it_back_within_its_window_and_are_told_everywhere(
    server: EmbeddedServer,
    client: Client,
    connection: Connection,
    versions: Mapping[str, str],
    route: str,
    routes: Routes,
    run: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run("canary", "start", route, "v2", "--every", "1h")
    call(client, route, "v1")
    call(client, route, "v2", "fail")

    with caplog.at_level(logging.WARNING):
        drivers(connection, versions).look()

    assert shares(routes, route) == {"v1": 90, "v2": 10}
    why = "100.0% of its rows failed (250 of 250), and 0.0% of the others'; max_error_rate is 0.01"
    assert why in run("show", route)
    assert f"route {route}: the canary of version v2 is rolled back: {why}" in caplog.text
    told = CliRunner().invoke(main, ["doctor", "--url", server.url, "--json"])
    (finding,) = [each for each in json.loads(told.stdout) if each["service"] == route]
    assert (finding["cause"], finding["severity"]) == ("canary_rolled_back", "warning")
    assert why in finding["what"]
    with exporting(server.url) as port:
        scrape = fetch(port)
        assert scrape.by("status", "millstream_canary", service=versions["v2"]) == {"rolled_back": 1}
        assert scrape.value("millstream_route_share", service=versions["v2"], route=route) == 0.1


def test_under_200_calls_it_waits_though_its_step_is_over(
    client: Client,
    connection: Connection,
    versions: Mapping[str, str],
    route: str,
    routes: Routes,
    run: Callable[..., str],
) -> None:
    driver = drivers(connection, versions)
    run("canary", "start", route, "v2", *PLAN)
    call(client, route, "v1")
    call(client, route, "v2", "fail", 199)

    for _ in range(20):
        driver.look()
    (shown,) = json.loads(run("show", route, "--json"))

    assert (shown["canary"]["status"], shown["canary"]["new"]["calls"]) == ("running", 199)
    assert "199 calls of 200 needed, 100.0% failed" in run("show", route)
    call(client, route, "v2", "fail", 1)
    driver.look()
    assert "rolled back" in run("show", route)


def test_one_supervisor_drives_and_another_goes_on_after_its_death(
    client: Client,
    connection: Connection,
    versions: Mapping[str, str],
    route: str,
    routes: Routes,
    run: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(canaries, "LEASE_MS", 50_000)
    first, second = drivers(connection, versions), drivers(connection, versions)
    run("canary", "start", route, "v2", "--every", "1h")
    first.look()
    call(client, route, "v2", "fail")

    second.look()
    assert shares(routes, route) == {"v1": 99, "v2": 1}

    # The first one looks no more: its lease ends.
    connection.client.hset(ServiceKeys(route).canary(), "until", 0)
    eventually(lambda: look(second) and shares(routes, route) == {"v1": 90, "v2": 10}, within_s=LONG_S)


def test_a_late_decision_changes_nothing(
    connection: Connection, route: str, routes: Routes, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    late, other = Canaries(connection.client, "late"), Canaries(connection.client, "other")
    keys = ServiceKeys(route)
    run("canary", "start", route, "v2", "--every", "1h")
    begun = routes.read(route).canary_run
    turn = late.look(keys, begun)
    assert turn.state
    decided = replace(turn.state, status="rolled_back", weights=turn.state.before)

    # While it thinks, its lease ends and another supervisor takes over.
    connection.client.hset(keys.canary(), "until", 0)
    assert other.look(keys, begun).state
    assert not late.decide(keys, turn, decided)
    # Or its lease ends and nobody takes over, or an operator changes the weights.
    connection.client.hset(keys.canary(), mapping={"until": 0, "driver": "late"})
    assert not late.decide(keys, turn, decided)
    run("set", route, "v1=50", "v2=50")
    assert not late.decide(keys, turn, decided)

    assert shares(routes, route) == {"v1": 50, "v2": 50}
    assert late.look(keys, begun).state is None


def test_it_is_stopped_with_the_weights_of_before_and_refused_where_it_makes_no_sense(
    connection: Connection, versions: Mapping[str, str], route: str, routes: Routes, run: Callable[..., str]
) -> None:
    assert "name the VERSION" in run("canary", "start", route, code=2)
    assert "did you mean v2" in run("canary", "start", route, "v22", code=2)
    assert "must be larger" in run("canary", "start", route, "v2", "--steps", "5,1", code=2)
    assert "no canary of route" in run("canary", "stop", route, code=2)

    run("canary", "start", route, "v2", "--every", "1h")
    assert "runs already" in run("canary", "start", route, "v2", code=2)
    assert "no supervisor drives it" in run("show", route)
    run("canary", "stop", route)

    assert shares(routes, route) == {"v1": 90, "v2": 10}
    run("promote", route, "v2")
    assert "none to compare it with" in run("canary", "start", route, "v2", code=2)
    with routing(connection, {**versions, "v2": "no-such-service"}, 1, 0) as other:
        run("canary", "start", other, "v2", code=4)


def test_a_version_without_a_worker_gets_a_canary_by_force_alone(
    server: EmbeddedServer, connection: Connection, versions: Mapping[str, str], run: Callable[..., str]
) -> None:
    idle = version_spec(f"canary-{uuid.uuid4().hex[:8]}", "v2")
    Registry(connection).push([idle])
    try:
        with routing(connection, {**versions, "v2": idle.name}, 1, 0) as name:
            assert "--force" in run("canary", "start", name, "v2", code=6)
            run("canary", "start", name, "v2", "--force")
    finally:
        remove(server.url, idle.name)


def test_a_worker_user_drives_and_a_client_user_follows(
    server: EmbeddedServer,
    client: Client,
    connection: Connection,
    versions: Mapping[str, str],
    route: str,
    run: Callable[..., str],
) -> None:
    users = []

    def login(role: Role) -> str:
        users.append(f"{role}-{uuid.uuid4().hex[:8]}")
        version = tuple(map(int, connection.client.info("server")["redis_version"].split(".")))
        given = ["ACL", "SETUSER", users[-1], "nopass", *rules(role, version, [*versions.values(), route])]
        connection.client.execute_command(*given)  # type: ignore[no-untyped-call]
        return f"{server.url}?username={users[-1]}&password=any"

    driving = Connection(login("worker"), name="tests")
    try:
        run("canary", "start", route, "v2", "--steps", "100", "--every", "1h")
        call(client, route, "v2", "fail")
        with Client(login("client")) as user:
            assert {cast(Values, user.submit(route, ["a"]).result(LONG_S)).version for _ in range(20)} == {"v2"}
            drivers(driving, versions).look()
            eventually(lambda: cast(Values, user.submit(route, ["a"]).result(LONG_S)).version == "v1")
    finally:
        driving.close()
        for each in users:
            connection.client.acl_deluser(each)


def test_a_lost_state_leaves_the_weights_of_before(
    connection: Connection, versions: Mapping[str, str], route: str, routes: Routes, run: Callable[..., str]
) -> None:
    run("canary", "start", route, "v2")

    connection.client.hset(ServiceKeys(route).canary(), "state", "{")
    drivers(connection, versions).look()
    assert shares(routes, route) == {"v1": 90, "v2": 10}
    connection.client.delete(ServiceKeys(route).canary())

    assert shares(routes, route) == {"v1": 90, "v2": 10}
    assert "canary of v2" not in run("show", route)
    run("canary", "start", route, "v2")
    assert shares(routes, route) == {"v1": 99, "v2": 1}
