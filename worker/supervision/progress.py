"""What a worker process leaves for its supervisor to read after its death: its state, and what its threads had in hand.

A file mapping without a name. The child writes; the parent reads at any time, also when the child is gone.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

MOST_ENTRIES = 65_536
"""How many entries one thread can have on its list."""

_NAME_BYTES = 44
"""The longest name of an entry and a space: a stream, a colon, two numbers of 64 bits with a hyphen between."""

_SLOT = MOST_ENTRIES * _NAME_BYTES
_STATE, _STALL = 0, 1
"""Header: the byte of the state, and the eight bytes, counted in eights, of the stall timeout."""

_REASON, _REASON_BYTES = 1024, 1024
_LISTS = 4096
_WORDS = 4
"""Header words of a track: sequence and stage, stamp, and for each of its two lists its length and place."""

_FIRST_WORD = 8
_STAGE_BITS = 8
_LENGTH_BITS = 32
_TRACKS = 3
SIZE = _LISTS + _TRACKS * 2 * _SLOT
"""Bytes of the mapping. Memory is taken only by the parts that were written."""


class State(IntEnum):
    STARTING = 0
    READY = 1
    DRAINING = 2


class Stage(IntEnum):
    """What a thread does with the entries on its list."""

    CLAIM = 1
    PREPARE = 2
    RUN = 3
    SETTLE = 4


class Snapshot(NamedTuple):
    """What one thread had in hand at one moment, and for how many seconds it had made no progress."""

    stage: Stage
    entries: list[str]
    seconds: float


class Track:
    """The list of one thread: only this thread writes it, anybody reads it at any time and never sees half a list.

    A new list is written beside the current one; one word, stored as a whole, then says which of both holds, and for
    which stage.
    """

    def __init__(self, page: mmap.mmap, words: memoryview[int], seconds: memoryview[float], index: int) -> None:
        self._page = page
        self._words = words
        self._seconds = seconds
        self._word = _FIRST_WORD + _WORDS * index
        self._stamp = self._word + 1
        self._lengths = self._word + 2
        self._lists = _LISTS + 2 * _SLOT * index
        self._sequence = self._words[self._word] >> _STAGE_BITS
        self._length = 0

    def start(self, entries: Iterable[str], stage: Stage) -> None:
        """Begin `stage` with these entries: until `stop`, the process's death counts as an attempt for them.

        Raises ValueError for more than the page holds.
        """
        text = " ".join(entries).encode()
        if len(text) > _SLOT:
            raise ValueError(f"a list of {len(text)} bytes, the page holds {_SLOT}")
        sequence = self._sequence + 1
        other = sequence & 1
        at = self._lists + other * _SLOT
        self._page[at : at + len(text)] = text
        self._words[self._lengths + other] = len(text)
        self._seconds[self._stamp] = time.monotonic()
        self._sequence, self._length = sequence, len(text)
        self._words[self._word] = sequence << _STAGE_BITS | stage

    def move(self, stage: Stage) -> None:
        """Go on to `stage` with the same entries, all of them."""
        self._words[self._lengths + (self._sequence & 1)] = self._length
        self._seconds[self._stamp] = time.monotonic()
        self._words[self._word] = self._sequence << _STAGE_BITS | stage

    def point(self, place: int) -> None:
        """Note progress, and that only the entry at `place` is in work now, counted from 1; 0: all of them are."""
        self._words[self._lengths + (self._sequence & 1)] = place << _LENGTH_BITS | self._length
        self._seconds[self._stamp] = time.monotonic()

    def lap(self) -> None:
        """Note progress within the stage: the stall timeout counts anew."""
        self._seconds[self._stamp] = time.monotonic()

    def stop(self) -> None:
        self._words[self._word] = self._sequence << _STAGE_BITS

    @property
    def ended_one(self) -> bool:
        """Whether a list that was started was also stopped, or followed by another one."""
        sequence, stage = divmod(self._words[self._word], 1 << _STAGE_BITS)
        return sequence > bool(stage)

    @property
    def idle_s(self) -> float:
        """Seconds without progress in the stage under way; 0.0 if there is none."""
        # In this order: a start writes its stamp before the word, and the stamp before that may be old.
        stage = self._words[self._word] % (1 << _STAGE_BITS)
        return time.monotonic() - self._seconds[self._stamp] if stage else 0.0

    def snapshot(self) -> Snapshot | None:
        """What it has in hand now, or had when the process died; None if it is in no stage."""
        while True:
            word = self._words[self._word]
            sequence, stage = divmod(word, 1 << _STAGE_BITS)
            if not stage:
                return None
            at = self._lists + (sequence & 1) * _SLOT
            place, length = divmod(self._words[self._lengths + (sequence & 1)], 1 << _LENGTH_BITS)
            text = self._page[at : at + length]
            idle_s = time.monotonic() - self._seconds[self._stamp]
            # The writer may have begun this list's place anew only after it changed the word.
            if self._words[self._word] == word:
                entries = text.decode().split()
                return Snapshot(Stage(stage), entries[place - 1 : place] if place else entries, idle_s)


class Progress:
    """One worker process's shared page, with a track for each thread that handles what jobs hold."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        view = memoryview(self._map)
        # Of numbers of eight bytes, each of which is read and written as a whole.
        self._words, self._seconds = view.cast("Q"), view.cast("d")
        view.release()
        self._tracks = [Track(self._map, self._words, self._seconds, index) for index in range(_TRACKS)]
        self.claimer, self.runner, self.settler = self._tracks

    @classmethod
    def create(cls) -> Progress:
        """A new page that a child can be given: it lives as long as one of both processes has it open."""
        fd = _nameless()
        os.ftruncate(fd, SIZE)
        return cls(fd)

    @classmethod
    def alone(cls) -> Progress:
        """A new page for one process."""
        return cls(-1)

    def close(self) -> None:
        self._words.release()
        self._seconds.release()
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)

    def enter(self, state: State) -> None:
        self._map[_STATE] = state

    def set_reason(self, reason: str) -> None:
        """Note why this process is about to end."""
        text = reason.encode()[: _REASON_BYTES - 1]
        self._map[_REASON : _REASON + len(text) + 1] = text + b"\0"

    @property
    def reason(self) -> str:
        """The process's last words, empty if it had none to say."""
        words, _, _ = self._map[_REASON : _REASON + _REASON_BYTES].partition(b"\0")
        return words.decode(errors="replace")

    @property
    def state(self) -> State:
        return State(self._map[_STATE])

    @property
    def worked(self) -> bool:
        """Whether a forward ended so far."""
        return self.runner.ended_one

    def running(self) -> list[str]:
        """The entries whose forward is under way, or was when the process died."""
        snapshot = self.runner.snapshot()
        return snapshot.entries if snapshot else []

    def snapshots(self) -> list[Snapshot]:
        """What each thread has in hand now, or had when the process died."""
        return [snapshot for track in self._tracks if (snapshot := track.snapshot())]

    @property
    def stall_s(self) -> float:
        """Seconds a stage may take without progress, by the limits that bind the child now."""
        return float(self._seconds[_STALL])

    @stall_s.setter
    def stall_s(self, seconds: float) -> None:
        self._seconds[_STALL] = seconds

    @property
    def is_stuck(self) -> bool:
        """Whether any thread is in its stage for longer than it may, without progress."""
        return any(track.idle_s > self.stall_s for track in self._tracks)

    def stuck(self) -> list[Snapshot]:
        """What the threads have in hand that are stuck."""
        return [snapshot for snapshot in self.snapshots() if snapshot.seconds > self.stall_s] if self.is_stuck else []


def _nameless() -> int:
    """A file without a name; in memory if the system can, since writing to a full disk ends the process."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("millstream")
    fd, path = tempfile.mkstemp(prefix="millstream-")
    os.unlink(path)
    return fd
