"""A lane of a pool ends alone, with its process, or ends its process because one of its threads failed."""

from __future__ import annotations

import pytest

from millstream.worker.shutdown import Shutdown, ThreadFailed


def test_a_lane_may_end_while_its_process_goes_on() -> None:
    process = Shutdown()
    one, two = Shutdown(process), Shutdown(process)

    one.drain()

    assert one.evicting
    assert (process.draining, two.draining, process.evicting) == (False, False, False)


def test_a_process_that_drains_ends_all_lanes_and_those_that_begin_later() -> None:
    process = Shutdown()
    one, forgotten = Shutdown(process), Shutdown(process)
    process.forget(forgotten)

    process.drain()

    assert one.draining
    assert not one.evicting
    assert not forgotten.draining
    assert Shutdown(process).draining


def test_a_thread_of_a_lane_that_fails_ends_the_process() -> None:
    process = Shutdown()
    one, two = Shutdown(process), Shutdown(process)

    with one.guard():
        raise RuntimeError("broken")

    assert two.draining
    for each in (one, process):
        with pytest.raises(ThreadFailed, match="broken"):
            each.check()
