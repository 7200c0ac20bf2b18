"""The picture of `millstream top`, in terminals of any size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from views import NONE, WORKER, view

from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.figure_text import rate
from millstream.broker.queue.metrics import ServiceMetrics, decode_metrics
from millstream.broker.queue.pace import Look, measure_paces
from millstream.broker.queue.pause import Pause
from millstream.cli.top import State, describe_trouble
from millstream.cli.top_frame import Picture, frame, latency, record

BUSY = replace(WORKER, running=4, running_ms=1_200, jobs=80, rows=320, forwards=40, busy_ms=4_000, age_ms=5_000)


def totals(name: str, settled: int = 0) -> ServiceMetrics:
    fields = {b"settled": str(settled).encode(), b"total:batch:50": str(settled).encode()}
    return decode_metrics(ServiceKeys(name), fields)


@pytest.fixture
def picture() -> Picture:
    waiting = NONE | {Priority.BATCH: 40}
    docs = view("docs", waiting=waiting, unsettled=waiting, held={BUSY.consumer: 4}, oldest_ms=3_000, workers=[BUSY])
    idle = view("chat", paused=Pause(refusing=True))
    before = Look(0.0, [docs, idle], [totals("docs"), totals("chat")])
    after = Look(2.0, [docs, idle], [totals("docs", 20), totals("chat")])
    return Picture(after, measure_paces(before, after), "redis://h", "10:00:00")


def test_a_service_and_its_priorities_that_have_jobs_are_shown(picture: Picture) -> None:
    lines = frame(picture, None)

    rows = {line.split()[0]: line.split() for line in lines if line}
    assert lines[0] == "millstream top 10:00:00  services 2, workers 1  redis://h"
    # Two seconds for 40 jobs: a worker that was busy for 4 s answered 80.
    assert rows["docs"][1:6] == ["40", "4", "3.0s", "2.0s", "10"]
    assert rows["batch"][1:] == ["40", "-", "-", "38ms", "49ms"]
    assert "realtime" not in rows
    assert rows["chat"][-2:] == ["yes,", "refusing"]
    assert rows["gpu1-7-aa"][1:8] == ["docs", "cuda:0", "ready", "4", "for", "1.2s", "-"]
    assert lines[-1] == "rates and latencies of the last 2 s"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 160, 200])
def test_no_line_is_wider_than_the_terminal_and_the_backlog_is_never_left_out(picture: Picture, width: int) -> None:
    lines = frame(picture, width)

    assert all(len(line) <= width for line in lines)
    assert width < 40 or any("BACKLOG" in line for line in lines)
    assert width < 160 or any("WAIT P50" in line and "REFUSED/S" in line for line in lines)


@pytest.mark.parametrize("height", [1, 2, 5, 11, 12])
def test_a_frame_is_not_higher_than_the_terminal_and_says_what_is_missing(picture: Picture, height: int) -> None:
    whole, lines = frame(picture, 80), frame(picture, 80, height)

    assert len(lines) == min(height, len(whole))
    if height < len(whole):
        assert lines[-1] == f"... {len(whole) - height + 1} more lines"


def test_what_a_worker_says_of_itself_cannot_control_the_terminal(picture: Picture) -> None:
    evil = replace(picture.look.views[0], workers=[replace(BUSY, device="\x1b[2J")])

    lines = frame(replace(picture, look=replace(picture.look, views=[evil, picture.look.views[1]])), None)

    assert "\x1b" not in "".join(lines)


def test_nothing_registered_and_nobody_alive_is_said(picture: Picture) -> None:
    lines = frame(replace(picture, look=Look(0.0, [], []), paces={}), 80)

    assert "no service is registered" in lines
    assert "no worker is alive" in lines
    assert lines[-1] == "rates and latencies need a second look"


def test_a_record_is_json_with_backlog_and_pace(picture: Picture) -> None:
    docs, chat = json.loads(json.dumps(record(picture)))["services"]

    assert (docs["name"], docs["backlog_s"], docs["pace"]["settled_per_s"]) == ("docs", 2.0, 10.0)
    assert docs["pace"]["total_ms"]["batch"]["count"] == 20
    assert (chat["backlog_s"], chat["paused"]) == (0.0, {"refusing": True, "left_ms": None})


def test_small_rates_have_a_digit_after_the_point() -> None:
    assert [rate(each) for each in (None, 0.0, 3.14, 9.96, 123.4)] == ["-", "0.0", "3.1", "10", "123"]


def test_latencies_are_in_ms_up_to_a_second() -> None:
    def total(bound: str) -> str:
        return latency(
            decode_metrics(ServiceKeys("s"), {f"total:batch:{bound}".encode(): b"1"}).total(Priority.BATCH), 1
        )

    assert [total(bound) for bound in ("5", "100", "1000", "60000")] == ["5.0ms", "100ms", "1.0s", "1m00s"]


def test_a_lost_and_a_silent_server_are_named_with_the_time(picture: Picture) -> None:
    assert describe_trouble(State(picture, at=10.0), now=12.9, interval_s=1.0) == ""
    assert describe_trouble(State(picture, at=10.0), now=14.0, interval_s=1.0) == "the server has not answered for 4 s"
    lost = State(picture, at=10.0, error="cannot reach redis://h")
    assert describe_trouble(lost, now=75.2, interval_s=1.0).startswith("SERVER LOST for 1m05s, figures of then: cannot")
