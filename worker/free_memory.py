"""Gives memory that is free back to the operating system, at moments after which much less of it is needed.

The C library keeps what lies between blocks in use. After weights were read, converted and laid out anew, or a large
cache was copied to a larger one, that is hundreds of megabytes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back_free_memory() -> None:
    """Returns the free pages of the heap to the system. Does nothing if the C library is not glibc."""
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Any:
    """The function of glibc, None with another C library."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None
