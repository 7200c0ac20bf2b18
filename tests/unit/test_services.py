"""What a process knows of the services is asked for once by many, and stays good while the server is away."""

from __future__ import annotations

import threading
from typing import cast

import pytest

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import BrokerUnavailable, UnknownService
from millstream.broker.queue.registry import Registered, Registry
from millstream.broker.transport.connection import Connection
from millstream.client import services as module
from millstream.client.services import Services


class FakeRegistry:
    """One embedding service; counts how often it is asked, and answers only while its gate is open."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = False
        self.gate = threading.Event()
        self.gate.set()

    def names(self) -> list[str]:
        self._ask()
        return ["embed"]

    def describe(self, service: str) -> Registered:
        self._ask()
        if service != "embed":
            raise UnknownService(f"no service {service!r}")
        model = ModelSpec(type="embedding", model_name="m")
        return Registered(ServiceSpec(name=service, model=model, model_ref="m", runtime=Runtime()), "weights")

    def keys(self, service: str) -> None: ...

    def _ask(self) -> None:
        self.asked += 1
        self.gate.wait(10)
        if self.away:
            raise BrokerUnavailable("away")


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
    monkeypatch.setattr(module, "FRESH_S", -1.0)

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
    monkeypatch.setattr(module, "FRESH_S", -1.0)
    registry.away = True

    services.read("embed")

    assert services.fingerprint("embed") == ""
