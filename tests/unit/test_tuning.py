"""A grid of batch limits: packed as a worker packs, measured in turn and in bounded time, the best one told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from millstream.broker.contract.errors import InputTooLong, MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json, Vectors
from millstream.worker.measuring.tuning import (
    FORWARD_S,
    ROWS,
    TOKENS,
    Cell,
    best,
    grid,
    measure,
    micro_batches,
    mix,
    rows_of,
)
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.batches import HOLD_BATCHES
from millstream.worker.window import Window

OWN = Budget(64, 2_048)


class Device:
    """A model whose forwards take `a_forward` + `a_token` x padded tokens on its own clock."""

    op = "embed"
    fingerprint = "device"
    sample_options = NO_OPTIONS

    def __init__(self, a_forward: float = 1e-3, a_token: float = 1e-6, room: int = 10**9) -> None:
        self.now = 0.0
        self.forwards = 0
        self._costs = a_forward, a_token
        self._room = room

    def clock(self) -> float:
        return self.now

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        texts = [str(text) for text in inputs]
        return [Prepared(len(text), text) if len(text) <= 512 else InputTooLong("too long") for text in texts]

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["x" * tokens]

    def forward(self, rows: Sequence[Prepared]) -> Vectors:
        padded = len(rows) * max(row.tokens for row in rows)
        if padded > self._room:
            raise RuntimeError("CUDA out of memory")
        self.forwards += 1
        self.now += self._costs[0] + self._costs[1] * padded
        return np.zeros((len(rows), 1), np.float32)


def warm(seconds_per_token: float = 1e-6, overhead: float = 128.0) -> Window:
    window = Window(Budget(OWN.rows, OWN.tokens, overhead))
    window.cost.seconds_per_token = seconds_per_token
    return window


def cells_of(device: Device, seconds: float = 60.0) -> list[Cell]:
    cells = grid(mix(device), warm(device._costs[1], device._costs[0] / device._costs[1]), OWN)
    for _ in measure(device, cells, seconds, device.clock):
        pass
    return cells


def test_the_mix_is_the_same_each_time_and_has_a_long_tail() -> None:
    lengths = sorted(row.tokens for row in mix(Device()))

    assert lengths == sorted(row.tokens for row in mix(Device()))
    assert len(lengths) == ROWS
    assert 45 < lengths[ROWS // 2] < 60
    assert 2 * sum(lengths) / ROWS < lengths[int(0.97 * ROWS)]


def test_rows_are_packed_within_their_limits_and_none_is_lost() -> None:
    rows = mix(Device())

    batches = micro_batches(rows, Window(OWN))

    assert sorted(row.tokens for batch in batches for row in batch) == sorted(row.tokens for row in rows)
    assert all(len(batch) <= OWN.rows for batch in batches)
    assert all(len(batch) * max(row.tokens for row in batch) <= OWN.tokens for batch in batches)


def test_no_more_rows_are_looked_at_than_a_worker_holds() -> None:
    """Later rows are of the first one's length, but a worker would not have claimed them yet."""
    window = Window(Budget(2, 10_000))
    early = [Prepared(length, "") for length in (5, *range(100, 100 + 2 * HOLD_BATCHES))]

    first = micro_batches([*early, Prepared(5, "late")], window)[0]

    assert "late" not in [row.features for row in first]


def test_the_grid_has_the_services_own_limits_and_no_two_that_pack_alike() -> None:
    cells = grid(mix(Device()), warm(), OWN)

    limits = [(cell.budget.tokens, cell.budget.rows) for cell in cells]
    shapes = [[len(batch) for batch in cell.batches] for cell in cells]
    assert (OWN.tokens, OWN.rows) in limits
    assert limits == sorted(set(limits))
    assert all(shapes.count(each) == 1 for each in shapes)
    assert all(1.0 <= cell.padding < 2.0 for cell in cells)


def test_limits_whose_forward_would_take_too_long_are_not_measured() -> None:
    slow = FORWARD_S / 2_048

    tokens = {cell.budget.tokens for cell in grid(mix(Device()), warm(slow), Budget(8, 512))}

    assert max(tokens) == 2_048
    assert {cell.budget.tokens for cell in grid(mix(Device()), warm(1.0), Budget(8, 512))} == set(TOKENS[:2])


def test_a_device_with_dear_forwards_is_given_large_batches_and_one_without_small_ones() -> None:
    nothing = Budget(1, 1)
    dear, cheap = (best(cells_of(Device(a_forward)), nothing) for a_forward in (20e-3, 1e-9))

    assert dear
    assert cheap
    assert dear.budget.tokens >= 4_096
    assert cheap.budget.tokens <= 1_024


def test_limits_within_five_percent_of_the_best_are_kept() -> None:
    small, own, fastest = (
        Cell(Budget(rows, tokens), [[]], 1.0) for rows, tokens in ((8, 512), (64, 2_048), (64, 8_192))
    )
    cells = [small, own, fastest]
    small.rates, fastest.rates = [97.0], [100.0]

    own.rates = [96.0]
    assert best(cells, OWN) is own
    own.rates = [94.0]
    assert best(cells, OWN) is small


def test_what_is_measured_is_the_rate_of_all_rows() -> None:
    device = Device()

    for cell in cells_of(device):
        seconds = sum(1e-3 + 1e-6 * len(batch) * max(row.tokens for row in batch) for batch in cell.batches)
        assert cell.rate == pytest.approx(ROWS / seconds, rel=0.05)
        assert len(cell.rates) == 3


def test_the_time_is_bounded_and_what_it_did_not_suffice_for_has_no_rate() -> None:
    device = Device(a_forward=1.0)

    cells = cells_of(device, seconds=5.0)

    assert device.now <= 5.0 + 2.0
    assert [bool(cell.rates) for cell in cells] == [True] * device.forwards + [False] * (len(cells) - device.forwards)
    assert best([], OWN) is None


def test_limits_without_room_in_memory_are_told_and_not_chosen() -> None:
    device = Device(20e-3, room=2_000)

    cells = cells_of(device)

    assert {cell.budget.tokens for cell in cells if cell.no_room} == {each for each in TOKENS if each > 2_000}
    chosen = best(cells, OWN)
    assert chosen
    assert chosen.budget.tokens == 1_024


def test_a_fault_of_the_model_ends_it() -> None:
    device = Device()
    cells = grid(mix(device), warm(), OWN)

    def broken(rows: Sequence[Prepared]) -> Vectors:
        raise RuntimeError("no kernel image")

    device.forward = broken  # type: ignore[method-assign]

    with pytest.raises(ModelUnavailable, match="no kernel image"):
        next(measure(device, cells, 1.0, device.clock))


def test_few_texts_are_repeated_and_those_the_model_refuses_left_out() -> None:
    rows, refused = rows_of(Device(), ["ab", "x" * 600, "abcd"])

    assert len(rows) >= ROWS
    assert {row.tokens for row in rows} == {2, 4}
    assert list(refused) == [1]
    assert rows_of(Device(), ["x" * 600])[0] == []
