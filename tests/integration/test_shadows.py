"""Shadows on a real server: compared, never waited for, never charged, and dropped before any call is."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner
from routed import ANSWERS, routing, version_spec
from scrapes import exporting, fetch
from support import eventually
from workers import LONG_S, remove, working

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.routes import Routes
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import AsyncClient, Client, shadows
from millstream.client.result import Values
from millstream.client.version_choice import Caller

CODE = (
    ANSWERS
    + """
def late(payloads):
    time.sleep(0.3)
    return ["v2"] * len(payloads)

def half(payloads):
    return ["v1" if payload == "same" else "v2" for payload in payloads]
"""
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "answers.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def services(server: EmbeddedServer) -> Iterator[dict[str, str]]:
    """Services of the versions that a test has made, which are removed afterwards."""
    made: dict[str, str] = {}
    yield made
    for service in made.values():
        remove(server.url, service)


def test_a_part_of_the_calls_is_compared_and_shown(
    server: EmbeddedServer, client: Client, connection: Connection, folder: Path, services: dict[str, str]
) -> None:
    name = f"shadow-{uuid.uuid4().hex[:8]}"
    specs = {"v1": version_spec(name, "v1"), "v2": version_spec(name, "half")}
    services |= {version: spec.name for version, spec in specs.items()}
    with (
        working(server.url, *specs.values(), folder=folder),
        routing(connection, services, 100, 0, shadow={"v2": 0.5}) as route,
    ):
        for _ in range(60):
            result = cast(Values, client.submit(route, ["same", "other"], timeout=LONG_S, priority="realtime").result())
            assert (list(result), result.version) == (["v1", "v1"], "v1")
        assert asyncio.run(call_async(server.url, route)) == ["v1"]
        totals = Metrics(connection)
        eventually(lambda: sum(totals.read(services["v2"]).shadows.values()) >= 10, within_s=LONG_S)

        found = totals.read(services["v2"])
        assert set(found.shadows) <= {"compared", "dropped"}
        assert found.histograms["shadow_agreement"].mean == pytest.approx(0.5, abs=0.1)
        assert {priority.value: count for priority, count in found.jobs.items() if count}.keys() == {"batch"}
        shown = CliRunner().invoke(main, ["route", "show", route, "--url", server.url])
        assert f"{route}: shadow of v2, 50.0% of the calls: " in shown.output
        (record,) = json.loads(CliRunner().invoke(main, ["route", "show", route, "--json", "--url", server.url]).output)
        assert record["shadows"][0]["compared"] == found.shadows["compared"]
        with exporting(server.url) as port:
            counts = fetch(port).by("outcome", "millstream_shadows_total", service=services["v2"])
            assert counts["compared"] == found.shadows["compared"]


async def call_async(url: str, route: str) -> list[object]:
    async with AsyncClient(url) as client:
        return list(cast(Values, await (await client.submit(route, ["same"], timeout=LONG_S))))


def test_a_shadow_that_fails_is_counted_and_its_call_is_not_affected(
    server: EmbeddedServer, client: Client, connection: Connection, folder: Path, services: dict[str, str]
) -> None:
    name = f"shadow-{uuid.uuid4().hex[:8]}"
    specs = {"v1": version_spec(name, "v1"), "v2": version_spec(name, "broken")}
    services |= {version: spec.name for version, spec in specs.items()}
    with (
        working(server.url, *specs.values(), folder=folder),
        routing(connection, services, 100, 0, shadow={"v2": 1}) as route,
    ):
        assert client.submit(route, ["a"], timeout=LONG_S).result() == ["v1"]
        eventually(lambda: Metrics(connection).read(services["v2"]).shadows == {"failed": 1}, within_s=LONG_S)


def test_calls_do_not_wait_for_a_slow_shadow_and_few_are_open_at_a_time(
    server: EmbeddedServer, client: Client, connection: Connection, folder: Path, services: dict[str, str]
) -> None:
    name = f"shadow-{uuid.uuid4().hex[:8]}"
    specs = {"v1": version_spec(name, "v1"), "v2": version_spec(name, "late", batch_size=1)}
    services |= {version: spec.name for version, spec in specs.items()}
    with (
        working(server.url, *specs.values(), folder=folder),
        routing(connection, services, 100, 0, shadow={"v2": 1}) as route,
    ):
        depths = []
        for _ in range(100):
            assert client.submit(route, ["a"], timeout=LONG_S).result() == ["v1"]
            depths.append(sum(client.stats(services["v2"]).sizes.values()))
        eventually(lambda: sum(Metrics(connection).read(services["v2"]).shadows.values()) == 100, within_s=LONG_S)

        found = Metrics(connection).read(services["v2"])
        assert max(depths) <= shadows.MOST
        assert found.shadows["dropped"] >= 50
        assert found.histograms["shadow_latency"].count == found.shadows["compared"]


def test_a_shadow_is_never_charged_and_a_full_queue_drops_it_uncounted(
    server: EmbeddedServer, client: Client, connection: Connection, folder: Path, services: dict[str, str]
) -> None:
    name = f"shadow-{uuid.uuid4().hex[:8]}"
    limit = {"rows": 1, "burst": 1, "per": "tenant"}
    specs = {
        "v1": version_spec(name, "v1"),
        "v2": version_spec(name, "late", batch_size=1, rate_limit=limit, max_queue_size=1),
    }
    services |= {version: spec.name for version, spec in specs.items()}
    with (
        working(server.url, *specs.values(), folder=folder),
        routing(connection, services, 100, 0, shadow={"v2": 1}) as route,
    ):
        for _ in range(20):
            client.submit(route, ["a"], timeout=LONG_S, tenant="t").result()
        eventually(lambda: sum(Metrics(connection).read(services["v2"]).shadows.values()) == 20, within_s=LONG_S)

        found = Metrics(connection).read(services["v2"])
        assert found.shadows.keys() == {"compared", "dropped"}
        assert found.refused == {}
        assert not connection.client.exists(ServiceKeys(services["v2"]).bucket())
        assert not connection.client.exists(ServiceKeys(services["v2"]).bucket("t"))


def test_there_are_no_shadows_beside_a_canary_or_of_pinned_calls(
    server: EmbeddedServer, client: Client, connection: Connection, folder: Path, services: dict[str, str]
) -> None:
    name = f"shadow-{uuid.uuid4().hex[:8]}"
    specs = {"v1": version_spec(name, "v1"), "v2": version_spec(name, "v2")}
    services |= {version: spec.name for version, spec in specs.items()}
    with (
        working(server.url, *specs.values(), folder=folder),
        routing(connection, services, 100, 0, shadow={"v2": 1}) as route,
    ):
        chosen = client._calls.services
        target = chosen.read_target(route)
        assert chosen.choose(target, Caller()).shadow.version == "v2"  # type: ignore[union-attr]
        assert chosen.choose(target, Caller(version="v1")).shadow is None
        start = ["route", "canary", "start", route, "v2", "--url", server.url]
        assert CliRunner().invoke(main, start).exit_code == 0
        eventually(lambda: chosen.choose(chosen.read_target(route), Caller()).shadow is None)
        assert Routes(connection).read(route).shadow == {"v2": 1}
