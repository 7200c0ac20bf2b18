"""What a worker process leaves for its supervisor to read after its death: state, progress stamp, entries running.

A small shared file mapping. The child writes; the parent reads at any time, also when the child is gone.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterable
from enum import IntEnum

SIZE = 64 * 1024
_HEADER = struct.Struct("<BxxxIddQ")  # state, sequence, stamp, since; the sequence's parity picks the slot
_SLOT = (SIZE - 64) // 2
_LENGTH = struct.Struct("<I")


class State(IntEnum):
    STARTING = 0
    READY = 1
    DRAINING = 2


class Progress:
    """One worker process's shared page."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)

    @classmethod
    def create(cls) -> Progress:
        """A new page, on a file without a name: it lives as long as one of both processes has it open."""
        fd, path = tempfile.mkstemp(prefix="millstream-")
        os.unlink(path)
        os.ftruncate(fd, SIZE)
        return cls(fd)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    def start(self, entries: Iterable[str]) -> None:
        """The forward of these entries begins: until `stop`, dying counts as an attempt for them."""
        self._write(entries)

    def stop(self) -> None:
        self._write(())

    def enter(self, state: State) -> None:
        self._map[0] = state

    @property
    def state(self) -> State:
        return State(self._map[0])

    def stamp(self) -> float:
        """time.monotonic() of the last start or stop; one clock for all processes of a host."""
        return float(_HEADER.unpack_from(self._map)[2])

    def running(self) -> list[str]:
        """The entries whose forward is under way, or was when the process died."""
        _, sequence, *_ = _HEADER.unpack_from(self._map)
        start = 64 + (sequence % 2) * _SLOT
        (length,) = _LENGTH.unpack_from(self._map, start)
        text = self._map[start + _LENGTH.size : start + _LENGTH.size + length].decode()
        return text.split() if text else []

    def _write(self, entries: Iterable[str]) -> None:
        # Into the slot not in use, then the sequence: a reader never sees half a list.
        state, sequence, *_ = _HEADER.unpack_from(self._map)
        text = " ".join(entries).encode()[: _SLOT - _LENGTH.size]
        start = 64 + ((sequence + 1) % 2) * _SLOT
        _LENGTH.pack_into(self._map, start, len(text))
        self._map[start + _LENGTH.size : start + _LENGTH.size + len(text)] = text
        _HEADER.pack_into(self._map, 0, state, (sequence + 1) % 2**32, time.monotonic(), 0.0, 0)
