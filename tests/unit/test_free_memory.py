"""A worker does not keep memory that it needed only to load its model."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from millstream.worker import free_memory
from millstream.worker.free_memory import give_back_free_memory

SMALL, COUNT = 32 * 1024, 4_000
"""Bytes below the size for which the C library asks the system each time."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_free_pages_between_blocks_in_use_go_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(SMALL) for _ in range(COUNT)]
    for each in blocks:
        ctypes.memset(each, 1, SMALL)
    # The last one stays, so the end of the heap does not move.
    for each in blocks[:-1]:
        libc.free(each)
    before = resident_bytes()

    give_back_free_memory()

    assert before - resident_bytes() > COUNT * SMALL // 2
    libc.free(blocks[-1])


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "_malloc_trim", lambda: None)

    give_back_free_memory()
