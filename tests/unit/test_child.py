"""The end of a process that hosts several services: each service's jobs are charged by its own page alone."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from millstream.worker.supervision.child import Child
from millstream.worker.supervision.child_args import ChildArgs, Hosted
from millstream.worker.supervision.progress import Progress, Stage, State


@pytest.fixture
def pages() -> Iterator[dict[str, Progress]]:
    pages = {"chat": Progress.create(), "embed": Progress.create()}
    for page in pages.values():
        page.stall_s = 60.0
        page.enter(State.READY)
    yield pages
    for page in pages.values():
        page.close()


def child_of(pages: dict[str, Progress], status: int | None = None) -> Child:
    process = SimpleNamespace(returncode=status, poll=lambda: status, kill=lambda: None)
    return Child("w1", cast("subprocess.Popen[bytes]", process), pages)


def charged(child: Child, service: str) -> list[str]:
    return [entry for stage in child.end_of(service).charged for entry in stage.entries]


def test_the_arguments_of_a_child_survive_the_command_line() -> None:
    args = ChildArgs([Hosted("chat", 3), Hosted("mill", 4, "mill:Mill")], "ms", "w1", None, 2, past="was killed")

    assert ChildArgs.from_json(args.to_json()) == args


def test_a_death_in_one_lane_charges_only_that_lanes_stages(pages: dict[str, Progress]) -> None:
    pages["chat"].runner.start(["1:1-1", "1:2-1"], Stage.RUN)

    child = child_of(pages, status=1)

    assert charged(child, "chat") == ["1:1-1", "1:2-1"]
    assert charged(child, "embed") == []
    assert str(child.end_of("chat")) == str(child.end) == "exited with status 1 during run"
    assert str(child.end_of("embed")) == "exited with status 1"


def test_entries_of_one_name_in_two_services_are_charged_apart(pages: dict[str, Progress]) -> None:
    pages["chat"].runner.start(["1:1-1"], Stage.RUN)
    pages["embed"].settler.start(["1:1-1", "1:5-1"], Stage.SETTLE)

    child = child_of(pages, status=-9)

    assert charged(child, "chat") == ["1:1-1"]
    assert charged(child, "embed") == ["1:1-1", "1:5-1"]
    assert str(child.end) == "was killed by SIGKILL during run and settle"


def test_a_stall_of_one_lane_kills_the_process_and_charges_that_lane_alone(pages: dict[str, Progress]) -> None:
    pages["embed"].stall_s = 0.0
    pages["embed"].claimer.start(["1:7-1"], Stage.PREPARE)
    pages["chat"].runner.start(["1:1-1"], Stage.RUN)
    child = child_of(pages)

    child.end_stuck()

    assert charged(child, "embed") == ["1:7-1"]
    assert charged(child, "chat") == []
    assert child.reason[0] == "embed"
    assert "the stall_timeout is 0 s" in child.reason[1]


def test_an_ordered_end_charges_no_lane(pages: dict[str, Progress]) -> None:
    pages["chat"].runner.start(["1:1-1"], Stage.RUN)
    child = child_of(pages)

    child.kill("the drain was cut short")

    assert [charged(child, service) for service in pages] == [[], []]


def test_a_process_is_ready_when_all_its_lanes_are(pages: dict[str, Progress]) -> None:
    child = child_of(pages)
    assert child.ready

    pages["embed"].enter(State.STARTING)

    assert not child.ready


def test_a_forward_of_any_lane_shows_that_the_device_works(pages: dict[str, Progress]) -> None:
    child = child_of(pages, status=1)
    assert child.failures(3) == 4

    pages["embed"].runner.start(["1:1-1"], Stage.RUN)
    pages["embed"].runner.stop()

    assert child.failures(3) == 1


def test_the_service_whose_model_failed_is_named(pages: dict[str, Progress]) -> None:
    pages["embed"].set_reason("no such model")

    assert child_of(pages, status=78).reason == ("embed", "no such model")
