"""What tests of every kind share."""

from __future__ import annotations

import time
from collections.abc import Callable

PAUSE_S = 0.01


def eventually(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Wait until `condition()` is true; fails the test after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {condition}"
        time.sleep(PAUSE_S)
