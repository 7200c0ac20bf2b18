"""What doctor makes of figures that are hard to stage on a real server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from workers import spec

from millstream.broker.contract.job import Priority
from millstream.broker.queue.announced import Announced
from millstream.broker.queue.diagnosis import Finding, diagnose
from millstream.broker.queue.pause import Pause
from millstream.broker.queue.server_facts import ServerFacts
from millstream.broker.queue.supervisors import SupervisorState, SupervisorView
from millstream.broker.queue.views import ServiceView, WorkerView

SERVER = ServerFacts(
    "redis://h", used_bytes=1, max_bytes=0, policy="noeviction", appends=True, failed_write="", clock_ms=3
)
WORKER = WorkerView("w1", "ready", "h", 1, "auto", "weights", 0, 0, 0, 0, "", 0, 0, 0, 0, 0, 0, 0, 0, 2048, 0, 1, {})
SUPERVISOR = SupervisorView(SupervisorState("h", 1, 1, 1, cores=2), age_ms=100, clock_ms=0)
DRAINED = SupervisorView(SupervisorState("h", 1, 1, 0, cores=2, drained=1), age_ms=100, clock_ms=0)
NONE: dict[Priority, int] = dict.fromkeys(Priority, 0)
WELL = ServiceView("docs", NONE, {}, 0, None, [WORKER], 0, None, {}, [SUPERVISOR], NONE)


def found(view: ServiceView = WELL, server: ServerFacts = SERVER) -> list[tuple[str, str]]:
    """Severity and cause of each finding."""
    return [(each.severity, each.cause) for each in findings(view, server)]


def findings(view: ServiceView = WELL, server: ServerFacts = SERVER) -> list[Finding]:
    return list(diagnose([(spec("docs", max_queue_size=10), view)], [server]))


def test_nothing_is_found_where_all_is_well() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (replace(SERVER, policy="allkeys-lru"), ("warning", "evicting_policy")),
        (replace(SERVER, policy="allkeys-lru", max_bytes=100), ("error", "evicting_policy")),
        (replace(SERVER, used_bytes=79, max_bytes=100), None),
        (replace(SERVER, used_bytes=80, max_bytes=100), ("warning", "memory_full")),
        (replace(SERVER, used_bytes=100, max_bytes=100), ("error", "memory_full")),
        (replace(SERVER, failed_write="aof_last_write_status"), ("error", "disk_write_failed")),
        (replace(SERVER, appends=False), ("warning", "not_durable")),
        (replace(SERVER, clock_ms=-2_000), ("warning", "clock_skew")),
        (replace(SERVER, clock_ms=1_999), None),
    ],
)
def test_what_is_wrong_with_the_server(server: ServerFacts, expected: tuple[str, str] | None) -> None:
    assert found(server=server) == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (
            replace(WELL, workers=[WORKER, replace(WORKER, consumer="w2", fingerprint="other")]),
            ("error", "mixed_weights"),
        ),
        (replace(WELL, unsettled=NONE | {Priority.BATCH: 7}), None),
        (replace(WELL, unsettled=NONE | {Priority.BATCH: 8}), ("warning", "queue_full")),
        (replace(WELL, unsettled=NONE | {Priority.BATCH: 10}), ("error", "queue_full")),
        (replace(WELL, held={"gone": 3}), ("warning", "stale_consumer")),
        (replace(WELL, held={"w1": 3}), None),
        (replace(WELL, workers=[replace(WORKER, threads=2)]), None),
        (replace(WELL, workers=[replace(WORKER, threads=3)]), ("warning", "too_many_threads")),
        (replace(WELL, workers=[replace(WORKER, consumer=f"w{at}") for at in range(3)]), None),
        (replace(WELL, dead_letters=2), ("note", "dead_letters")),
        (replace(WELL, workers=[replace(WORKER, state="draining")]), ("warning", "no_worker")),
        (replace(WELL, workers=[], returned=1, supervisors=[]), ("error", "no_worker")),
        (replace(WELL, workers=[], returned=1), ("note", "starting")),
        (replace(WELL, drained={"h": "drain"}), ("note", "drained")),
        (replace(WELL, paused=Pause(), workers=[replace(WORKER, state="paused")]), ("warning", "paused")),
        (replace(WELL, drained={"h": "drain"}, workers=[], supervisors=[DRAINED]), ("warning", "drained")),
        (replace(WELL, drained={"h": "drain"}, workers=[], supervisors=[DRAINED], returned=1), ("error", "drained")),
        (replace(WELL, workers=[replace(WORKER, state="paused")], supervisors=[]), None),
        (replace(WELL, announced=Announced(2, 4_000, None)), None),
        (replace(WELL, announced=Announced(2, 60_000, None)), ("warning", "no_webhook_sender")),
        (replace(WELL, announced=Announced(2, 60_000, 1_000)), None),
        (replace(WELL, announced=Announced(2, 60_000, 6_000)), ("warning", "no_webhook_sender")),
        (replace(WELL, announced=Announced(0, 0, 60_000)), None),
        (replace(WELL, supervisors=[replace(SUPERVISOR, age_ms=6_000)]), ("warning", "dead_supervisor")),
        (replace(WELL, supervisors=[replace(SUPERVISOR, clock_ms=9_000)]), ("warning", "clock_skew")),
    ],
)
def test_what_is_wrong_with_a_service(view: ServiceView, expected: tuple[str, str] | None) -> None:
    assert found(view) == ([expected] if expected else [])


def test_a_server_without_a_disk_is_durable_enough_if_every_job_is_replicated() -> None:
    replicated = spec("docs").model_copy(update={"replicated": True})
    server = replace(SERVER, appends=False)

    assert diagnose([(replicated, WELL)], [server]) == []
    assert [each.cause for each in diagnose([(replicated, WELL), (spec("docs"), WELL)], [server])] == ["not_durable"]


def test_errors_come_first_and_commands_can_be_copied() -> None:
    view = replace(WELL, name="two words", dead_letters=1, workers=[], supervisors=[], returned=1)

    first, second = findings(view)

    assert (first.severity, second.severity) == ("error", "note")
    assert first.fix == "millstream worker run 'two words'"


def test_no_service_at_all_is_told() -> None:
    (finding,) = diagnose([], [SERVER])

    assert (finding.cause, finding.fix) == ("no_service", "millstream config push")


def test_a_drained_place_beside_one_that_starts_is_named_beside_it() -> None:
    half = SupervisorView(SupervisorState("h", 1, 2, 0, cores=2, drained=1), age_ms=100, clock_ms=0)

    assert [each.what for each in findings(replace(WELL, drained={"w1": "stop"}, workers=[], supervisors=[half]))] == [
        "an operator keeps workers away (w1): 0 jobs waiting",
        "workers are starting (1), 0 jobs waiting",
    ]


def test_a_model_that_a_pool_cannot_load_is_an_error_without_another_worker() -> None:
    state = SupervisorState("h", 7, 1, 0, cores=2, unloaded="these weights are broken")
    alone = replace(WELL, workers=[], supervisors=[SupervisorView(state, age_ms=100, clock_ms=0)])

    (finding,) = [each for each in findings(alone) if each.cause == "model_not_loaded"]

    assert finding.severity == "error"
    assert "these weights are broken" in finding.what
    assert ("warning", "model_not_loaded") in found(replace(alone, workers=[WORKER]))
