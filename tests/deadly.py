"""A custom model whose payloads can end or hang their worker in each stage: `exit in check`, `hang in settle`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

STATUS = 7


def exhaust() -> None:
    from millstream.worker.models.echo import exhaust_memory

    exhaust_memory()


ENDS: Mapping[str, Callable[[], object]] = {
    "exit": lambda: os._exit(STATUS),
    "leave": lambda: os._exit(0),
    "hang": threading.Event().wait,
    "slow": lambda: threading.Event().wait(0.5),
    "exhaust": exhaust,
}


def meet(stage: str, payload: str) -> None:
    how, _, where = payload.partition(" in ")
    if where == stage:
        ENDS[how]()


class Answer(dict[str, str]):
    """A result that meets its end when it is encoded for the second time: the first is a check beside its forward."""

    encoded = 0

    def items(self) -> Any:
        self.encoded += 1
        if self.encoded > 1:
            meet("settle", self["payload"])
        return super().items()


class Deadly:
    """Answers each payload with itself in a list."""

    def check(self, payload: str) -> None:
        meet("check", payload)

    def cost(self, payload: str) -> int:
        meet("cost", payload)
        return 1

    def __call__(self, payloads: list[str]) -> list[Any]:
        for each in payloads:
            meet("run", each)
        return [Answer(payload=each) for each in payloads]
