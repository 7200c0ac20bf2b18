"""Arguments of a pool's process. A module with light imports only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolArgs:
    """Settings of a pool. `memory`: most bytes that its process may use, None for no limit.

    `residence_s`: seconds that a model stays at least, None for the default.
    """

    name: str
    memory: int | None = None
    residence_s: float | None = None
