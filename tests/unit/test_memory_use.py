"""Sizes of models are the measured memory of the process: now, and at its peak."""

from __future__ import annotations

import gc

import numpy as np

from millstream.worker.measuring.memory_use import ProcessMemory

MB = 1_000_000


def test_what_is_allocated_is_seen_and_what_is_freed_is_not() -> None:
    meter = ProcessMemory()
    before = meter.used()
    weights = [np.ones(80 * MB // 8)]
    assert 70 * MB < meter.used() - before < 130 * MB

    weights.clear()
    meter.free()

    assert meter.used() - before < 30 * MB


def test_the_peak_is_that_since_the_last_begin() -> None:
    meter = ProcessMemory()
    np.ones(100 * MB // 8)
    meter.begin()
    before = meter.used()
    assert meter.peak() - before < 30 * MB

    np.ones(60 * MB // 8)

    assert 50 * MB < meter.peak() - before < 100 * MB
    assert meter.used() - before < 30 * MB


def test_what_was_frozen_after_a_load_is_freed_too() -> None:
    class Model:
        def __init__(self) -> None:
            self.weights, self.itself = np.ones(80 * MB // 8), self

    meter = ProcessMemory()
    before = meter.used()
    model = Model()
    gc.freeze()
    del model

    meter.free()

    assert meter.used() - before < 30 * MB
    gc.unfreeze()
