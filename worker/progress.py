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
_STATE, _CURRENT, _WORKED, _STAMP, _STALL = 0, 1, 2, slice(8, 16), slice(16, 24)
"""Where the header keeps the state, which of the two slots holds the list, whether a forward ended, the stamp, and the
stall timeout."""
_HEADER_SIZE = 64
_WORDS_SIZE = 1024
_SLOT = (SIZE - _HEADER_SIZE - _WORDS_SIZE) // 2
_LENGTH = struct.Struct("<I")
_SECONDS = struct.Struct("<d")


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
        self._map[_WORKED] = 1

    def lap(self) -> None:
        """One forward of those that were started has ended, and another begins: nothing is stuck."""
        self._map[_STAMP] = _SECONDS.pack(time.monotonic())

    def enter(self, state: State) -> None:
        self._map[_STATE] = state

    def last_words(self, reason: str) -> None:
        """Why this process is about to end."""
        text = reason.encode()[: _WORDS_SIZE - 1]
        self._map[SIZE - _WORDS_SIZE : SIZE - _WORDS_SIZE + len(text) + 1] = text + b"\0"

    @property
    def reason(self) -> str:
        """The process's last words, empty where it had none to say."""
        words, _, _ = self._map[SIZE - _WORDS_SIZE :].partition(b"\0")
        return words.decode(errors="replace")

    @property
    def state(self) -> State:
        return State(self._map[_STATE])

    @property
    def worked(self) -> bool:
        """Whether a forward ended so far."""
        return bool(self._map[_WORKED])

    def stamp(self) -> float:
        """time.monotonic() of the last start or stop; one clock for all processes of a host."""
        return float(_SECONDS.unpack(self._map[_STAMP])[0])

    def running(self) -> list[str]:
        """The entries whose forward is under way, or was when the process died."""
        start = _HEADER_SIZE + self._map[_CURRENT] * _SLOT
        (length,) = _LENGTH.unpack_from(self._map, start)
        text = self._map[start + _LENGTH.size : start + _LENGTH.size + length].decode()
        return text.split() if text else []

    def running_s(self) -> float:
        """Seconds since the forward under way began; 0.0 where none is. Read by a supervisor while the child writes."""
        # In this order: the stamp of an idle process is old, and a start writes a new one before its list is seen.
        return time.monotonic() - self.stamp() if self.running() else 0.0

    @property
    def stall_s(self) -> float:
        """Seconds a forward may take, by the limits that bind the child now."""
        return float(_SECONDS.unpack(self._map[_STALL])[0])

    @stall_s.setter
    def stall_s(self, seconds: float) -> None:
        self._map[_STALL] = _SECONDS.pack(seconds)

    @property
    def stuck(self) -> bool:
        """Whether the forward under way takes longer than it may."""
        return self.running_s() > self.stall_s

    def _write(self, entries: Iterable[str]) -> None:
        # Into the slot not in use, then one byte says so: a reader never sees half a list. Slices are copied whole,
        # where pack_into would first write zeros.
        other = 1 - self._map[_CURRENT]
        text = " ".join(entries).encode()[: _SLOT - _LENGTH.size]
        start = _HEADER_SIZE + other * _SLOT
        self._map[start : start + _LENGTH.size] = _LENGTH.pack(len(text))
        self._map[start + _LENGTH.size : start + _LENGTH.size + len(text)] = text
        self.lap()
        self._map[_CURRENT] = other
