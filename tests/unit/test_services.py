"""What a process knows of the services is asked for once by many, and stays good while the server is away."""

from __future__ import annotations

import threading
from typing import cast

import pytest

from millstream.broker.config.route import RouteSpec
from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import BrokerUnavailable, InvalidRequest, UnknownService
from millstream.broker.queue.registry import Registered, Registry
from millstream.broker.transport.connection import Connection
from millstream.client import known as known_module
from millstream.client import services as module
from millstream.client.services import Services
from millstream.client.version_choice import Caller


class FakeRegistry:
    """One embedding service; counts how often it is asked, and answers only while its gate is open."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = False
        self.gate = threading.Event()
        self.gate.set()
        self.services = {"embed"}
        self.routes: dict[str, RouteSpec] = {}

    def names(self) -> list[str]:
        self._ask()
        return ["embed"]

    def look_up(self, name: str) -> tuple[Registered | None, RouteSpec | None]:
        self._ask()
        return (_registered(name) if name in self.services else None), self.routes.get(name)

    def unknown(self, name: str, route: RouteSpec | None = None) -> UnknownService:
        return UnknownService(f"no service {name!r}")

    def keys(self, service: str) -> None: ...

    def _ask(self) -> None:
        self.asked += 1
        self.gate.wait(10)
        if self.away:
            raise BrokerUnavailable("away")


def _registered(name: str) -> Registered:
    model = ModelSpec(type="embedding", model_name="m")
    return Registered(ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime()), "weights")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> FakeRegistry:
    monkeypatch.setattr(module, "Lease", lambda client, keys: FakeLease())
    monkeypatch.setattr(module, "find_pause", lambda client, keys: None)
    return FakeRegistry()


class FakeLease:
    def live_workers(self) -> int:
        return 2


@pytest.fixture
def services(registry: FakeRegistry) -> Services:
    return Services(Connection("redis://nowhere"), cast(Registry, registry))


@pytest.mark.parametrize("ask", ["read", "live_workers"])
def test_threads_that_ask_at_once_share_an_answer(services: Services, registry: FakeRegistry, ask: str) -> None:
    registry.gate.clear()
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(getattr(services, ask)("embed"))) for _ in range(50)]
    for thread in threads:
        thread.start()
    registry.gate.set()
    for thread in threads:
        thread.join(10)

    assert len(answers) == 50
    # A second time for threads that began to ask after the first answer was on its way.
    assert registry.asked <= 2


def test_what_was_read_a_moment_ago_is_known(services: Services, registry: FakeRegistry) -> None:
    assert services.known("embed") is None
    spec = services.read("embed")

    assert services.known("embed") == services.read("embed") == spec
    assert services.live("embed", lambda: None) == 2
    assert registry.asked == 1


def test_what_was_read_stays_good_while_the_server_is_away(
    services: Services, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.only("embedding")
    services.read("embed")
    registry.away = True
    monkeypatch.setattr(known_module, "FRESH_S", -1.0)

    assert services.read("embed").name == "embed"
    assert services.only("embedding") == "embed"
    with pytest.raises(BrokerUnavailable):
        services.live_workers("embed")


def test_what_was_never_read_needs_the_server(services: Services, registry: FakeRegistry) -> None:
    registry.away = True

    with pytest.raises(BrokerUnavailable):
        services.read("embed")
    with pytest.raises(BrokerUnavailable):
        services.only("embedding")


def test_a_type_nobody_serves_is_unknown(services: Services) -> None:
    with pytest.raises(UnknownService):
        services.only("reranker")


def test_the_weights_of_a_service_are_known_while_the_server_says_them(
    services: Services, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert services.fingerprint("embed") == ""
    services.read("embed")
    assert services.fingerprint("embed") == "weights"
    monkeypatch.setattr(known_module, "FRESH_S", -1.0)
    registry.away = True

    services.read("embed")

    assert services.fingerprint("embed") == ""


def test_a_call_to_a_service_without_a_route_asks_the_server_once(services: Services, registry: FakeRegistry) -> None:
    target = services.read_target("embed")

    assert services.choose(target, Caller()).spec.name == "embed"
    assert services.read_target("embed") is target
    assert services.live("embed", lambda: None) == 2
    assert services.read("embed").name == "embed"
    assert registry.asked == 1


def test_a_call_to_a_route_goes_to_the_service_of_one_version(services: Services, registry: FakeRegistry) -> None:
    registry.services = {"embed", "embed@v2"}
    registry.routes["embed"] = RouteSpec(
        name="embed", services={"v1": "embed", "v2": "embed@v2"}, weights={"v1": 1.0, "v2": 1.0}, sticky="tenant"
    )
    target = services.read_target("embed")
    asked = registry.asked

    chosen = {services.choose(target, Caller(f"tenant-{at}")).spec.name for at in range(50)}

    assert chosen == {"embed", "embed@v2"}
    assert services.choose(target, Caller(version="v2")).version == "v2"
    assert registry.asked == asked
    with pytest.raises(InvalidRequest, match="has no version 'v3'"):
        services.choose(target, Caller(version="v3"))


def test_the_route_of_a_name_that_is_no_service_is_no_service(services: Services, registry: FakeRegistry) -> None:
    registry.routes["all"] = RouteSpec(name="all", services={"v1": "embed"}, weights={"v1": 1.0})

    assert services.choose(services.read_target("all"), Caller()).spec.name == "embed"
    with pytest.raises(UnknownService):
        services.read("all")


def test_a_version_that_is_not_registered_is_named(
    services: Services, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.routes["all"] = RouteSpec(name="all", services={"v1": "gone"}, weights={"v1": 1.0})
    monkeypatch.setattr(FakeRegistry, "unregistered", Registry.unregistered, raising=False)

    with pytest.raises(UnknownService, match="no service 'gone', its version 'v1'"):
        services.choose(services.read_target("all"), Caller())
