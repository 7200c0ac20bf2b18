"""Page of shared memory with a worker's state and the entries of its threads, readable after the worker's death.

It is a file mapping without a name. The child writes it; the parent reads it at any time, also after the child's death.
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
"""Most entries on the list of one thread."""

_NAME_BYTES = 44
"""Bytes of the longest name of an entry and a space: stream, colon, two numbers of 64 bits with a hyphen between."""

_SLOT = MOST_ENTRIES * _NAME_BYTES
_STATE, _STALL = 0, 1
"""Places in the header: of the state, in bytes, and of the stall timeout, in words of 8 bytes."""

_REASON, _REASON_BYTES = 1024, 1024
_LISTS = 4096
_WORDS = 4
"""Header words of a track: sequence and stage, stamp, and one for each of its two lists: length and place."""

_FIRST_WORD = 8
_STAGE_BITS = 8
_LENGTH_BITS = 32
_TRACKS = 3
SIZE = _LISTS + _TRACKS * 2 * _SLOT
"""Bytes of the mapping. Only written parts use memory."""


class State(IntEnum):
    """State of a worker process."""

    STARTING = 0
    READY = 1
    DRAINING = 2


class Stage(IntEnum):
    """Work of a thread on the entries of its list."""

    CLAIM = 1
    PREPARE = 2
    RUN = 3
    SETTLE = 4


class Snapshot(NamedTuple):
    """Stage and entries of one thread at one moment, and the seconds since its last progress."""

    stage: Stage
    entries: list[str]
    seconds: float


class Track:
    """The list of one thread. Only this thread writes it; others may read it at any time and never see half a list.

    A new list is written into the second of two places. One word, which is stored atomically, then names the valid
    place and the stage.
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
        """Begins `stage` with these entries. Until `stop`, the process's death is charged to them as an attempt.

        Raises ValueError if the list is too long for the page.
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
        """Goes on to `stage` with all the same entries."""
        self._words[self._lengths + (self._sequence & 1)] = self._length
        self._seconds[self._stamp] = time.monotonic()
        self._words[self._word] = self._sequence << _STAGE_BITS | stage

    def point(self, place: int) -> None:
        """Notes progress, and that only the entry at `place`, from 1, is in work now; 0: all entries are."""
        self._words[self._lengths + (self._sequence & 1)] = place << _LENGTH_BITS | self._length
        self._seconds[self._stamp] = time.monotonic()

    def lap(self) -> None:
        """Notes progress within the stage: the stall timeout starts again."""
        self._seconds[self._stamp] = time.monotonic()

    def stop(self) -> None:
        """Ends the stage: the process's death is charged to none of its entries any more."""
        self._words[self._word] = self._sequence << _STAGE_BITS

    @property
    def ended_one(self) -> bool:
        """Whether any started list was stopped, or followed by another one."""
        sequence, stage = divmod(self._words[self._word], 1 << _STAGE_BITS)
        return sequence > bool(stage)

    @property
    def idle_s(self) -> float:
        """Seconds since the last progress in the current stage; 0.0 if there is none."""
        # Read the word first: `start` writes the stamp before the word, so this stamp cannot be older than the stage.
        stage = self._words[self._word] % (1 << _STAGE_BITS)
        return time.monotonic() - self._seconds[self._stamp] if stage else 0.0

    def snapshot(self) -> Snapshot | None:
        """The current stage, or that at the death of the process; None if there is none."""
        while True:
            word = self._words[self._word]
            sequence, stage = divmod(word, 1 << _STAGE_BITS)
            if not stage:
                return None
            at = self._lists + (sequence & 1) * _SLOT
            place, length = divmod(self._words[self._lengths + (sequence & 1)], 1 << _LENGTH_BITS)
            text = self._page[at : at + length]
            idle_s = time.monotonic() - self._seconds[self._stamp]
            # The writer changes the word before it writes this place again, so an unchanged word means a whole list.
            if self._words[self._word] == word:
                entries = text.decode().split()
                return Snapshot(Stage(stage), entries[place - 1 : place] if place else entries, idle_s)


class Progress:
    """The shared page of one worker process, with a track for each thread that handles the contents of jobs."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        view = memoryview(self._map)
        # Numbers of 8 bytes, each of which is read and written atomically.
        self._words, self._seconds = view.cast("Q"), view.cast("d")
        view.release()
        self._tracks = [Track(self._map, self._words, self._seconds, index) for index in range(_TRACKS)]
        self.claimer, self.runner, self.settler = self._tracks

    @classmethod
    def create(cls) -> Progress:
        """A new page to pass to a child. It exists as long as one of both processes has it open."""
        fd = _nameless()
        os.ftruncate(fd, SIZE)
        return cls(fd)

    @classmethod
    def alone(cls) -> Progress:
        """A new page for a process without a supervisor."""
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
        """Notes why this process is about to end; cut to 1023 bytes."""
        text = reason.encode()[: _REASON_BYTES - 1]
        self._map[_REASON : _REASON + len(text) + 1] = text + b"\0"

    @property
    def reason(self) -> str:
        """The noted reason for the end of the process; "" if there is none."""
        words, _, _ = self._map[_REASON : _REASON + _REASON_BYTES].partition(b"\0")
        return words.decode(errors="replace")

    @property
    def state(self) -> State:
        return State(self._map[_STATE])

    @property
    def worked(self) -> bool:
        """Whether any forward has ended."""
        return self.runner.ended_one

    def running(self) -> list[str]:
        """The entries of the running forward, or of that at the death of the process."""
        snapshot = self.runner.snapshot()
        return snapshot.entries if snapshot else []

    def snapshots(self) -> list[Snapshot]:
        """The current stage of each thread, or that at the death of the process."""
        return [snapshot for track in self._tracks if (snapshot := track.snapshot())]

    @property
    def stall_s(self) -> float:
        """Seconds that a stage may take without progress, by the child's current limits."""
        return float(self._seconds[_STALL])

    @stall_s.setter
    def stall_s(self, seconds: float) -> None:
        self._seconds[_STALL] = seconds

    @property
    def is_stuck(self) -> bool:
        """Whether any thread has made no progress in its stage for more than `stall_s`."""
        return any(track.idle_s > self.stall_s for track in self._tracks)

    def stuck(self) -> list[Snapshot]:
        """The stages of the stuck threads."""
        return [snapshot for snapshot in self.snapshots() if snapshot.seconds > self.stall_s] if self.is_stuck else []


def _nameless() -> int:
    """Opens a file without a name, in memory if the system can: writing a mapping on a full disk ends the process."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("millstream")
    fd, path = tempfile.mkstemp(prefix="millstream-")
    os.unlink(path)
    return fd
