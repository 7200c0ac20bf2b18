"""When faults happen in a chaos run: a kind that misses is tried again beyond the time, but not for ever."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import pytest
from chaos_lib import lanes
from chaos_lib.faults import Landing, Missed
from chaos_lib.lanes import Lane, Record, drive
from chaos_lib.site import Site

SITE = cast(Site, None)
"""The faults here harm nothing."""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "PAUSE_S", 0.0)


def driven(misses: float) -> Record:
    """What became of a fault that first misses so often, in a run that has no time for it."""
    tries: list[Random] = []

    def fault(site: Site, chance: Random) -> Landing:
        tries.append(chance)
        if len(tries) <= misses:
            raise Missed("no worker lives")
        return Landing()

    records: dict[str, Record] = {}
    kinds: Any = {"worker killed": (fault, 3.0)}
    drive([Lane(kinds, 1.0)], SITE, "7", 0.0, records)
    return records["worker killed"]


def test_a_kind_that_misses_is_tried_until_it_lands_once() -> None:
    record = driven(misses=20)

    assert (len(record.landed), record.missed) == (1, ["no worker lives"] * 20)


def test_a_kind_that_cannot_land_does_not_keep_the_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "INSIST_S", 0.05)

    record = driven(misses=float("inf"))

    assert record.landed == []
    assert record.missed
