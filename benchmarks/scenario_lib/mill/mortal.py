"""A model that doubles `n`, and whose process ends at a payload that says so: {"n": 3, "die": "function"}."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

FORWARD_S = 0.2
TOKENS = 32
"""An equal share of a batch of 64 rows."""


class Mill:
    def check(self, payload: dict[str, Any]) -> None:
        die(payload, "check")

    def cost(self, payload: dict[str, Any]) -> int:
        die(payload, "cost")
        return TOKENS

    def __call__(self, payloads: Sequence[dict[str, Any]]) -> list[int]:
        time.sleep(FORWARD_S)
        for payload in payloads:
            die(payload, "function")
        return [2 * payload["n"] for payload in payloads]


def die(payload: dict[str, Any], where: str) -> None:
    if payload.get("die") == where:
        os._exit(1)
