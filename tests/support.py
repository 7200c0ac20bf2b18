"""What tests of every kind share."""

from __future__ import annotations

import time
from collections.abc import Callable

PAUSE_S = 0.01
LATER_PAUSE_S = 0.04
"""Between two looks, in the first second and afterwards. A look often asks the server."""

SOON_S = 1.0


def eventually(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Wait until `condition()` is true; fails the test after `within_s` seconds."""
    began = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - began
        assert waited_s < within_s, f"not within {within_s:g} s: {condition}"
        time.sleep(PAUSE_S if waited_s < SOON_S else LATER_PAUSE_S)
