"""Which workers and hosts an order of an operator reaches, and what the operator is told."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from views import SUPERVISOR, WORKER, view

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.queue.drains import find_order, is_on, read_drains
from millstream.cli.drain_workers import describe, find_orders, find_subjects
from millstream.cli.worker import kept_empty
from millstream.worker.supervision.child import Child
from millstream.worker.supervision.progress import Progress, Stage

W1, W2 = replace(WORKER, consumer="gpu1-7-aa"), replace(WORKER, consumer="gpu2-8-bb", host="gpu2")
VIEWS = [view("chat", workers=[W1]), view("embed", workers=[W1, W2]), view("rerank")]


def child() -> tuple[Child, list[object]]:
    """A child whose signals are kept; -9 is its death."""
    signals: list[object] = []
    process = SimpleNamespace(
        returncode=None, poll=lambda: None, kill=lambda: signals.append(-9), send_signal=signals.append
    )
    return Child("w", cast("subprocess.Popen[bytes]", process), {"docs": Progress.create()}), signals


def test_a_worker_is_found_in_each_service_that_it_hosts() -> None:
    found = find_subjects(VIEWS, "gpu1-7-aa")

    assert [(each.service, set(each.consumers)) for each in found] == [
        ("chat", {"gpu1-7-aa"}),
        ("embed", {"gpu1-7-aa"}),
    ]


def test_a_host_is_found_by_its_workers_and_by_its_supervisor() -> None:
    starting = replace(SUPERVISOR, state=replace(SUPERVISOR.state, host="gpu9"))
    views = [*VIEWS, view("tags", supervisors=[starting])]

    assert [(each.service, set(each.consumers)) for each in find_subjects(views, "gpu2")] == [("embed", {"gpu2-8-bb"})]
    assert [(each.service, set(each.consumers)) for each in find_subjects(views, "gpu9")] == [("tags", set())]


def test_a_supervisor_that_is_gone_is_no_host() -> None:
    with pytest.raises(InvalidRequest, match="there are: none"):
        find_subjects([view("tags", supervisors=[replace(SUPERVISOR, age_ms=60_000)])], "h")


def test_an_unknown_name_is_answered_with_the_names_that_exist_and_the_closest() -> None:
    with pytest.raises(InvalidRequest) as caught:
        find_subjects(VIEWS, "gpu3")

    assert caught.value.message == "no live worker or host 'gpu3'"
    assert caught.value.hint in {
        f"did you mean {close}? there are: gpu1, gpu2, gpu1-7-aa, gpu2-8-bb" for close in ("gpu1", "gpu2")
    }


def test_a_host_is_started_with_all_that_was_drained_on_it() -> None:
    views = [
        view("chat", drained={"gpu1": "drain", "gpu2-8-bb": "stop"}),
        view("embed", drained={"gpu1-7-aa": "drain", "gpu10": "drain"}),
    ]

    assert find_orders(views, "gpu1") == {"chat": ["gpu1"], "embed": ["gpu1-7-aa"]}
    assert find_orders(views, "gpu2-8-bb") == {"chat": ["gpu2-8-bb"]}


def test_a_name_without_an_order_is_answered_with_those_that_have_one() -> None:
    with pytest.raises(InvalidRequest, match="'gpu3' was not drained or stopped") as caught:
        find_orders([view("chat", drained={"gpu1": "drain"})], "gpu3")

    assert caught.value.hint == "did you mean gpu1? there are: gpu1"


def test_a_service_that_loses_its_last_ready_worker_is_named() -> None:
    subjects = find_subjects(VIEWS, "gpu1-7-aa")

    assert list(describe("drain", subjects, VIEWS)) == [
        "gpu1-7-aa: draining 1 worker of chat",
        "gpu1-7-aa: draining 1 worker of embed",
        "warning: service chat has no other ready worker: its jobs will wait",
    ]


def test_what_is_kept_empty_is_listed_once_with_its_services() -> None:
    views = [view("chat", drained={"gpu1": "drain"}), view("embed", drained={"gpu1": "drain", "gpu2-8-bb": "stop"})]

    assert kept_empty(views) == [
        "kept empty by an operator: gpu1 (chat, embed); millstream worker start gpu1",
        "kept empty by an operator: gpu2-8-bb (embed); millstream worker start gpu2-8-bb",
    ]


@pytest.mark.parametrize(
    ("names", "order"), [(["h"], "drain"), (["w"], "stop"), (["h", "w"], "stop"), (["other"], None), ([], None)]
)
def test_a_stop_goes_before_a_drain(names: list[str], order: str | None) -> None:
    assert find_order({"h": "drain", "w": "stop"}, names) == order


def test_an_order_of_a_newer_version_is_a_drain() -> None:
    assert read_drains({b"h": b"cordon", b"w": b"stop"}) == {"h": "drain", "w": "stop"}
    assert read_drains(None) == {}


def test_a_long_host_has_its_workers() -> None:
    long = "h" * 40

    assert is_on(long, f"{'h' * 32}-1-aa")
    assert not is_on("gpu1", "gpu10-1-aa")


def test_a_drain_is_one_signal_and_a_kill_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    drained, signals = child()
    clock = iter([10.0, 11.0, 12.1])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))

    for _ in range(3):
        drained.follow("drain", 2.0)

    assert signals == [15, -9]
    assert drained.ordered == "it did not drain in 2 s"


def test_a_stop_kills_once_and_charges_nothing() -> None:
    stopped, signals = child()
    stopped.pages["docs"].runner.start(["1:1-1"], Stage.RUN)

    stopped.follow("stop", 2.0)
    stopped.follow("stop", 2.0)

    assert signals == [-9]
    assert stopped.end_of("docs").charged == ()
