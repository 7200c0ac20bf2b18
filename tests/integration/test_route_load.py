"""Routes under many calls: shares, callers that move, killed versions, canaries, long lists. MILLSTREAM_LONG: more."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from routed import ANSWERS, routing, version_spec
from support import eventually
from workers import LONG_S, remove, working

from millstream.broker.config.canary import CanaryPlan
from millstream.broker.queue.canaries import read_samples
from millstream.broker.queue.canary_judge import begin
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.routes import Routes
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.client.result import Values
from millstream.client.version_choice import Caller, choose_version
from millstream.worker.supervision.canary_driver import driving

LONG = bool(os.environ.get("MILLSTREAM_LONG"))
CALLS = 10_000 if LONG else 1_000
TENANTS = 5_000 if LONG else 300
ROWS = 100_000 if LONG else 3_000
WAITING = 2_000 if LONG else 200
CANARY = CanaryPlan(to="v2", steps=(5, 25, 100) if LONG else (50, 100), every=5 if LONG else 1, max_p99_ratio=1000)
TIMEOUT_S = 30.0

CODE = (
    ANSWERS
    + """
def halfway(payloads):
    if "fail" in payloads:
        raise RuntimeError("broken")
    return ["v2"] * len(payloads)
"""
)


@pytest.fixture(scope="module")
def versions(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Two versions with a worker each. v2 fails for the row "fail"."""
    name, folder = f"load-{uuid.uuid4().hex[:8]}", tmp_path_factory.mktemp("code")
    (folder / "answers.py").write_text(CODE)
    specs = [version_spec(name, version, batch_size=64, max_queue_size=100_000) for version in ("v1", "halfway")]
    with working(server.url, *specs, folder=folder):
        yield {"v1": specs[0].name, "v2": specs[1].name}
    for each in specs:
        remove(server.url, each.name)


def version_of(handle: object) -> str:
    return cast(Values, handle.result()).version  # type: ignore[attr-defined]


def is_share(found: int, count: int, share: float) -> bool:
    """Whether a count is within four standard deviations of a binomial distribution."""
    return abs(found - count * share) <= 4 * math.sqrt(count * share * (1 - share))


def test_a_tenth_of_many_calls_goes_to_the_new_version(
    client: Client, connection: Connection, versions: Mapping[str, str]
) -> None:
    with routing(connection, versions, 90, 10) as name:
        found: Counter[str] = Counter()
        for _ in range(CALLS // 1_000):
            handles = [client.submit(name, ["a"], timeout=LONG_S) for _ in range(1_000)]
            found.update(map(version_of, handles))

    assert found.total() == CALLS
    assert is_share(found["v2"], CALLS, 0.1), found


def test_tenants_keep_their_version_and_only_those_move_that_must(
    client: Client, connection: Connection, versions: Mapping[str, str]
) -> None:
    tenants = [f"tenant-{number}" for number in range(TENANTS)]

    def ask() -> dict[str, str]:
        handles = {tenant: client.submit(name, ["a"], timeout=LONG_S, tenant=tenant) for tenant in tenants}
        return {tenant: version_of(handle) for tenant, handle in handles.items()}

    with routing(connection, versions, 90, 10, sticky="tenant") as name:
        before, again = ask(), ask()
        route = Routes(connection).change(name, lambda standing: standing.weighted({"v1": 75.0, "v2": 25.0}))
        follower = next(each for each in tenants if choose_version(route, versions, Caller(each)) != before[each])
        moved = [client.submit(name, ["a"], timeout=LONG_S, tenant=follower)]
        eventually(lambda: moved.append(client.submit(name, ["a"], tenant=follower)) or version_of(moved[-1]) == "v2")  # type: ignore[func-returns-value]
        after = ask()

    assert again == before
    assert is_share(Counter(before.values())["v2"], TENANTS, 0.1)
    movers = [tenant for tenant in tenants if before[tenant] != after[tenant]]
    assert {(before[tenant], after[tenant]) for tenant in movers} == {("v1", "v2")}
    assert is_share(len(movers), TENANTS, 0.15)


def test_calls_that_wait_for_a_killed_version_are_withdrawn_and_answered_in_time(
    server: EmbeddedServer, client: Client, connection: Connection, versions: Mapping[str, str], tmp_path: Path
) -> None:
    (tmp_path / "answers.py").write_text(CODE)
    spec = version_spec(f"load-{uuid.uuid4().hex[:8]}", "slow", max_queue_size=100_000)
    services = {**versions, "v2": spec.name}
    try:
        with routing(connection, services, 0, 100, fallback="v1") as name:
            with working(server.url, spec, folder=tmp_path) as supervisor:
                began = time.monotonic()
                handles = [client.submit(name, ["a"], timeout=TIMEOUT_S) for _ in range(WAITING)]
                (view,) = Inspector(connection).services([spec.name])
                supervisor.stop()
                for worker in view.workers:
                    os.kill(worker.pid, signal.SIGKILL)
                killed = time.monotonic()
            found = Counter(map(version_of, handles))
            waited = time.monotonic() - killed

            assert found["v1"] > 0
            assert found.total() == WAITING
            assert time.monotonic() - began < TIMEOUT_S
            # A lease, a look of the call, and the calls themselves: far less than half of the time-out.
            assert waited < TIMEOUT_S / 2
            eventually(lambda: sum(client.stats(spec.name).sizes.values()) == 0)
            with working(server.url, spec, folder=tmp_path):
                eventually(lambda: version_of(client.submit(name, ["a"], timeout=TIMEOUT_S)) == "v2", within_s=LONG_S)
    finally:
        remove(server.url, spec.name)


@contextmanager
def calling(client: Client, name: str, threads: int = 8) -> Iterator[Counter[str]]:
    """Calls meanwhile. The versions that answered; "" counts the calls that failed."""
    found, over = Counter[str](), threading.Event()

    def call() -> None:
        while not over.is_set():
            handles = [client.submit(name, ["a"], timeout=TIMEOUT_S) for _ in range(20)]
            try:
                found.update(map(version_of, handles))
            except Exception:  # noqa: BLE001 - each is a failed call
                found[""] += 1

    running = [threading.Thread(target=call) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield found
    finally:
        over.set()
        for thread in running:
            thread.join(LONG_S)


def test_a_good_canary_promotes_itself_under_calls_and_fails_none(
    client: Client, connection: Connection, versions: Mapping[str, str]
) -> None:
    routes, metrics = Routes(connection), Metrics(connection)
    with routing(connection, versions, 100, 0) as name, driving(connection.url, "ms", [versions["v1"]]):
        with calling(client, name) as found:
            eventually(lambda: found["v1"] > 500, within_s=LONG_S)
            assert found["v2"] == 0
            route, now = routes.read(name), routes.now(name)
            samples = read_samples(metrics, route, "v2", route.weights)
            routes.start_canary(name, lambda standing: begin(CANARY, standing.weights, samples, now, "run"))

            def status() -> str:
                view = routes.canary(routes.read(name))
                assert view
                assert view.state.status != "rolled_back", view.state.reason
                return view.state.status

            eventually(lambda: status() == "promoted", within_s=2 * LONG_S)
        assert routes.read(name).weights == {"v1": 0, "v2": 100}
    assert found[""] == 0


def test_no_list_mixes_versions_over_changes_of_weights_and_a_fallback_in_its_middle(
    client: Client, connection: Connection, versions: Mapping[str, str]
) -> None:
    routes, metrics, over = Routes(connection), Metrics(connection), threading.Event()
    rows = ["a"] * ROWS
    rows[ROWS * 3 // 5] = "fail"

    def change() -> None:
        while not over.is_set():
            routes.change(name, lambda each: each.weighted({"v1": each.weights["v2"], "v2": each.weights["v1"]}))
            over.wait(0.037)

    with routing(connection, versions, 0, 100, fallback="v1") as name:
        answered = metrics.read(versions["v2"]).ok
        changer = threading.Thread(target=change)
        first = client.submit(name, rows)
        assert first.version == "v2"
        changer.start()
        try:
            fallen = cast(Values, first.result(3 * LONG_S))
            thrown_away = metrics.read(versions["v2"]).ok - answered
            lists: list[Values] = []
            while len(lists) < 10 or len({each.version for each in lists}) < 2:
                lists.append(cast(Values, client.submit(name, rows[: ROWS // 2]).result(LONG_S)))
        finally:
            over.set()
            changer.join(LONG_S)

    # The first version had answered rows of the list before it failed.
    assert thrown_away > 0
    assert (fallen.version, list(fallen)) == ("v1", ["v1"] * ROWS)
    assert all(list(each) == [each.version] * (ROWS // 2) for each in lists)
