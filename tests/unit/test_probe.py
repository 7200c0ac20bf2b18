"""What `max_batch_tokens: auto` comes to: measured with a model whose forwards cost what a test says, on its clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.config.spec import UNKNOWN_TOKENS
from millstream.broker.contract.errors import MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json, Vectors
from millstream.worker.measuring.probe import (
    MOST_TOKENS,
    REPEATS,
    auto_tokens,
    most_tokens,
    probe,
)
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.scheduling.memory import is_exhaustion

Cost = Callable[[int], float]
"""Seconds of a forward, by its padded tokens."""


class Device:
    """A model that reads `longest` tokens; its forwards only move its clock on."""

    op = "embed"
    fingerprint = "device"
    sample_options = NO_OPTIONS

    def __init__(self, cost: Cost, *, longest: int = 512, room: int = 10**9) -> None:
        self.now = 0.0
        self.batches: list[tuple[int, int]] = []
        self._cost = cost
        self._longest = longest
        self._room = room

    def clock(self) -> float:
        return self.now

    @property
    def tokens(self) -> list[int]:
        """Padded tokens of each forward."""
        return [rows * longest for rows, longest in self.batches]

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return [Prepared(len(str(text)), text) for text in inputs]

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["x" * min(tokens, self._longest)]

    def forward(self, rows: Sequence[Prepared]) -> Vectors:
        longest = max(row.tokens for row in rows)
        self.batches.append((len(rows), longest))
        if len(rows) * longest > self._room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.now += self._cost(len(rows) * longest)
        return np.zeros((len(rows), 1), np.float32)


def saturating(at: int, a_token: float = 1e-6) -> Cost:
    """A device that takes the same time for any batch below `at` tokens, and in proportion above."""
    return lambda tokens: max(tokens, at) * a_token


def spec(model_type: str, max_batch_tokens: object) -> ServiceSpec:
    model = ModelSpec.model_validate({"type": model_type, "model_name": "m"})
    runtime = Runtime.model_validate({"batch_size": 64, "max_batch_tokens": max_batch_tokens})
    return ServiceSpec(name="s", model=model, model_ref="m", runtime=runtime)


@pytest.mark.parametrize("saturated", [256, 1_024, 8_192])
def test_the_smallest_batch_is_taken_that_keeps_the_device_busy(saturated: int) -> None:
    device = Device(saturating(saturated))

    assert probe(device, 256, device.clock) == saturated


def test_it_ends_two_sizes_after_the_last_gain() -> None:
    device = Device(saturating(512))

    probe(device, 256, device.clock)

    assert max(device.tokens) == 4 * 512


def test_one_slow_size_does_not_end_it() -> None:
    """A neighbour on the same machine slowed all forwards of one size."""
    device = Device(lambda tokens: max(tokens, 4_096) * 1e-6 * (3 if tokens == 1_024 else 1))

    assert probe(device, 256, device.clock) == 4_096


def test_one_slow_forward_of_several_changes_nothing() -> None:
    calls = iter(range(10**6))
    device = Device(lambda tokens: max(tokens, 1_024) * 1e-6 * (1 if next(calls) % REPEATS else 5))

    assert probe(device, 256, device.clock) == 1_024


def test_rows_grow_longer_where_the_service_allows_no_more_of_them() -> None:
    device = Device(saturating(4_096))

    assert probe(device, 8, device.clock) == 4_096
    assert (8, 512) in device.batches
    assert max(rows for rows, _ in device.batches) == 8


def test_a_model_that_reads_little_bounds_it() -> None:
    device = Device(saturating(10**6, 1e-9), longest=16)

    assert probe(device, 32, device.clock) == 32 * 16


def test_a_device_that_is_never_busy_is_given_no_more_than_the_most() -> None:
    device = Device(saturating(10**9, 1e-12))

    assert probe(device, 1_024, device.clock) == MOST_TOKENS


def test_a_size_without_room_in_memory_is_a_bound_and_no_failure() -> None:
    device = Device(saturating(8_192), room=2_048)

    assert probe(device, 256, device.clock) == 2_048


def test_a_device_without_room_for_the_smallest_batch_cannot_run_the_model() -> None:
    device = Device(saturating(256), room=10)

    with pytest.raises(ModelUnavailable, match="256 padded tokens"):
        probe(device, 64, device.clock)


def test_any_other_fault_of_the_model_is_its_failure() -> None:
    device = Device(saturating(256))

    def broken(rows: Sequence[Prepared]) -> Vectors:
        raise RuntimeError("no kernel image is available")

    device.forward = broken  # type: ignore[method-assign]

    with pytest.raises(ModelUnavailable, match="no kernel image"):
        probe(device, 64, device.clock)


@pytest.mark.parametrize("a_token", [2e-5, 5e-5, 1e-4])
def test_a_slow_device_is_measured_for_a_few_seconds_and_no_forward_takes_more_than_one(a_token: float) -> None:
    device = Device(lambda tokens: a_token * (tokens + 2_000))

    probe(device, 256, device.clock)

    assert len(set(device.tokens)) > 3
    assert max(a_token * (tokens + 2_000) for tokens in device.tokens) <= 1.0


def test_it_takes_about_five_seconds_at_most() -> None:
    """Each size would be better than the one before, and is within a second."""
    device = Device(lambda tokens: 0.45)

    probe(device, 256, device.clock)

    assert 3.0 < device.now <= 5.0 + 0.45


def test_a_device_too_slow_for_a_second_size_gets_the_smallest() -> None:
    device = Device(lambda tokens: 0.1 * tokens)

    assert probe(device, 64, device.clock) == 256


@pytest.mark.parametrize(
    ("model_type", "setting", "measured"),
    [("embedding", "auto", True), ("reranker", "auto", True), ("embedding", 512, False)]
    + [(model_type, "auto", False) for model_type in ("echo", "custom", "llm")],
)
def test_only_auto_is_measured_and_only_where_tokens_cost_something(
    model_type: str, setting: object, measured: bool
) -> None:
    device = Device(saturating(1_024, 1e-9))

    found = auto_tokens(spec(model_type, setting), device)

    assert (found is not None, bool(device.batches)) == (measured, measured)


@pytest.mark.parametrize(
    ("setting", "measured", "tokens"), [(512, None, 512), ("auto", None, UNKNOWN_TOKENS), ("auto", 8_192, 8_192)]
)
def test_auto_is_what_was_measured_or_else_a_fixed_number(setting: object, measured: int | None, tokens: int) -> None:
    assert most_tokens(spec("echo", setting).runtime, measured) == tokens


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("shape"), False),
    ],
)
def test_want_of_memory_is_told_from_other_faults(error: Exception, is_memory: bool) -> None:
    assert is_exhaustion(error) is is_memory
