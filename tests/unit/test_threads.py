"""How many threads a forward runs on: measured, with a model whose forwards cost what a test says, on its clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import pytest

from millstream.broker.contract.errors import MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json, Vectors
from millstream.worker.measuring.cores import Claims
from millstream.worker.measuring.threads import (
    FORWARD_S,
    MEASURE_S,
    Threads,
    counts,
    describe_waiting,
    fastest,
    measure,
    operator_threads,
    waiting,
)
from millstream.worker.models.base import NO_OPTIONS, Prepared

Cost = Callable[[int, int], float]
"""Seconds of a forward, by its rows and threads."""


class Device:
    """A model whose forwards only move its clock on."""

    op = "embed"
    fingerprint = "device"
    sample_options = NO_OPTIONS
    backend = "torch"

    def __init__(self, cost: Cost, device_type: str = "cpu") -> None:
        self.now = 0.0
        self.threads = 0
        self.ran: list[tuple[int, int]] = []
        self.device_type = device_type
        self.error: Exception | None = None
        self.cost = cost

    def clock(self) -> float:
        return self.now

    def use(self, count: int) -> None:
        self.threads = count

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return [Prepared(len(str(each).split()), each) for each in inputs]

    def forward(self, rows: Sequence[Prepared]) -> Vectors:
        if self.error:
            raise self.error
        self.ran.append((len(rows), self.threads))
        self.now += self.cost(len(rows), self.threads)
        return np.ones((len(rows), 1), np.float32)

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["a " * tokens]


class Neighbours:
    """A host of `share` cores for this worker."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.left = False

    def leave(self) -> None:
        self.left = True


def large(rows: int, threads: int) -> float:
    """A forward whose work is divided among threads."""
    return 0.02 * rows / threads


def tiny(rows: int, threads: int) -> float:
    """A forward that waits longer for its threads than it works."""
    return 0.001 + 0.001 * threads


def choosing(device: Device, most: int, neighbours: Neighbours | None = None, **environ: str) -> Threads:
    threads = Threads(most, environ, cast(Claims, neighbours) if neighbours else None)
    # On the device's clock.
    threads.clock = device.clock
    threads.choose(device, device.use)
    return threads


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (2, [2, 1]), (6, [6, 4, 2, 1]), (8, [8, 4, 2, 1])])
def test_all_cores_and_the_powers_of_two_below_are_tried(most: int, tried: list[int]) -> None:
    assert counts(most) == tried


@pytest.mark.parametrize(("cost", "chosen"), [(large, 8), (tiny, 1), (lambda rows, threads: 0.05 / min(threads, 4), 4)])
def test_the_fewest_threads_that_are_fastest_are_chosen(cost: Cost, chosen: int) -> None:
    device = Device(cost)

    threads = choosing(device, 8)

    assert (threads.count, device.threads) == (chosen, chosen)
    assert str(threads) == f"{chosen} thread{'s' if chosen > 1 else ''} (measured)"


def test_measuring_takes_no_longer_than_it_may() -> None:
    device = Device(lambda rows, threads: 0.9)

    rates = measure(device, 16, device.use, device.clock)

    # One look at each number, and the round that was under way.
    assert device.now < MEASURE_S + 2 * len(counts(16)) * 2 * 0.9 + 2
    assert fastest(rates, 16) == 1


def test_a_number_that_is_much_slower_ends_the_search() -> None:
    device = Device(large)

    rates = measure(device, 64, device.use, device.clock)

    assert sorted(rates) == [32, 64]
    assert max(rows for rows, _ in device.ran) * large(1, 64) <= FORWARD_S


def test_a_model_whose_forward_takes_seconds_is_not_measured() -> None:
    device = Device(lambda rows, threads: 8.0 / threads)

    threads = choosing(device, 4)

    assert (threads.count, str(threads)) == (4, "4 threads")
    assert len(device.ran) == 2


def test_one_core_needs_no_measuring() -> None:
    device = Device(large)

    threads = choosing(device, 1)

    assert (threads.count, device.threads, device.ran, str(threads)) == (1, 1, [], "1 thread")


def test_what_the_operator_set_is_used_without_measuring() -> None:
    device = Device(tiny)

    threads = choosing(device, 8, Neighbours(1), OMP_NUM_THREADS="3,1", OMP_WAIT_POLICY="PASSIVE")

    assert (threads.count, device.threads, device.ran) == (3, 3, [])
    assert str(threads) == "3 threads (OMP_NUM_THREADS), OMP_WAIT_POLICY=PASSIVE"


@pytest.mark.parametrize("value", ["", "0", "many", "-1"])
def test_what_is_no_number_of_threads_is_none(value: str) -> None:
    assert operator_threads({"OMP_NUM_THREADS": value}) is None


def test_threads_wait_for_a_bounded_time_unless_the_operator_says_how() -> None:
    assert waiting({}) == {"GOMP_SPINCOUNT": "3000"}
    assert waiting({"GOMP_SPINCOUNT": "5"}) == waiting({"OMP_WAIT_POLICY": "ACTIVE"}) == {}
    assert describe_waiting({"GOMP_SPINCOUNT": "10000", "HOME": "/"}) == "GOMP_SPINCOUNT=10000"


def on_a_busy_host(rows: int, threads: int) -> float:
    """A forward whose threads wait for a core that another process has."""
    return 0.02 * rows * (1 if threads == 1 else 1.5)


def run(threads: Threads, device: Device, forwards: int = 50) -> set[int]:
    """Runs forwards as a worker does. Returns the numbers of threads that they ran on."""
    for _ in range(forwards):
        before = device.now
        device.forward([Prepared(8, "a")] * 2)
        threads.observe(16, device.now - before)
    return {count for _, count in device.ran[-forwards:]}


def test_a_process_that_gets_busy_later_changes_the_number_of_threads(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(large)
    threads = choosing(device, 2)
    assert (threads.count, run(threads, device)) == (2, {1, 2})

    device.cost = on_a_busy_host
    with caplog.at_level("INFO"):
        run(threads, device)

    assert (threads.count, device.threads) == (1, 1)
    assert [record.message for record in caplog.records] == [
        "threads of a forward: 1 instead of 2, which is faster now"
    ]


def test_a_trial_goes_on_after_another_model_of_the_process() -> None:
    device = Device(large)
    threads = choosing(device, 2)
    while device.threads == 2:
        run(threads, device, 1)

    device.use(8)
    threads.apply()

    assert (threads.count, device.threads) == (2, 1)


def test_the_operators_number_is_the_most_that_is_tried() -> None:
    device = Device(large)
    threads = choosing(device, 8, OMP_NUM_THREADS="2")

    assert run(threads, device) == {1, 2}


@pytest.mark.parametrize("value", ["false", "FALSE", " 0"])
def test_the_operator_can_forbid_other_numbers(value: str) -> None:
    device = Device(on_a_busy_host)
    threads = choosing(device, 8, OMP_NUM_THREADS="2", OMP_DYNAMIC=value)

    assert run(threads, device) == {2}


def test_another_share_of_the_cores_ends_a_trial() -> None:
    device, neighbours = Device(large), Neighbours(4)
    threads = choosing(device, 8, neighbours)
    while device.threads == 4:
        run(threads, device, 1)

    neighbours.share = 2
    threads.update_share()
    threads.adapt(idle=False)

    assert (threads.count, device.threads) == (2, 2)
    assert run(threads, device) == {1, 2}


def test_workers_that_come_and_go_change_the_number_of_threads() -> None:
    device, neighbours = Device(large), Neighbours(8)
    threads = choosing(device, 8, neighbours)
    ran = len(device.ran)

    neighbours.share = 4
    threads.update_share()
    # Only the thread that runs forwards may change its threads.
    assert device.threads == 8
    threads.adapt(idle=True)
    assert (threads.count, device.threads) == (4, 4)

    neighbours.share = 8
    threads.update_share()
    threads.adapt(idle=True)
    assert (threads.count, device.threads) == (8, 8)
    assert len(device.ran) == ran


def test_cores_that_become_free_are_measured_before_they_are_used() -> None:
    device, neighbours = Device(large), Neighbours(1)
    threads = choosing(device, 2, neighbours)
    assert (threads.count, device.ran) == (1, [])

    neighbours.share = 8
    threads.update_share()
    threads.adapt(idle=True)

    # No more than its supervisor gave it.
    assert (threads.count, set(threads.rates)) == (2, {1, 2})


def test_a_forward_that_fails_beside_the_measuring_leaves_the_threads_as_they_are() -> None:
    device, neighbours = Device(large), Neighbours(1)
    threads = choosing(device, 8, neighbours)

    device.error = ValueError("broken")
    neighbours.share = 8
    threads.update_share()
    threads.adapt(idle=True)
    threads.adapt(idle=True)

    assert (threads.count, device.threads) == (1, 1)


def test_a_model_that_fails_cannot_be_measured_and_one_without_memory_is_not() -> None:
    device = Device(large)
    device.error = ValueError("broken")
    with pytest.raises(ModelUnavailable, match="the model fails in its warm-up"):
        choosing(device, 8)

    device.error = MemoryError()
    assert choosing(device, 8).count == 8


def test_a_model_on_another_device_leaves_the_cores_to_others() -> None:
    device, neighbours = Device(large, "cuda"), Neighbours(8)

    threads = choosing(device, 8, neighbours)
    neighbours.share = 4
    threads.update_share()
    threads.adapt(idle=True)

    assert (neighbours.left, device.ran, device.threads) == (True, [], 0)


def test_a_busy_worker_uses_cores_that_become_free_and_measures_them_later() -> None:
    device, neighbours = Device(large), Neighbours(2)
    threads = choosing(device, 8, neighbours)
    ran = len(device.ran)

    neighbours.share = 8
    threads.update_share()
    threads.adapt(idle=False)
    assert (threads.count, device.threads, len(device.ran)) == (8, 8, ran)

    threads.adapt(idle=True)
    assert max(threads.rates) == 8
