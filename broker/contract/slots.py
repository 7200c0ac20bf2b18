"""Slots of a server that already runs: how many requests it may run at once, shared by all workers that send to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Demand(NamedTuple):
    """One worker's requests: those that the server runs for it, and those that it would send besides."""

    running: int
    waiting: int


class Slots(NamedTuple):
    """The record of one server as a worker reads it.

    `now`: clock, ms. `version` rises with each change of `state`, which only workers interpret; "" at first.
    `workers`: demands of the live workers, by consumer.
    """

    now: int
    version: int
    state: str
    workers: Mapping[str, Demand]
