"""A model that answers with its input. It needs no torch: it is for tests and benchmarks of the queue."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json, Vectors
from millstream.broker.contract.operations import ECHO
from millstream.worker.models.base import NO_OPTIONS, Prepared

SPARE_BYTES, CHUNK_BYTES = 256 * 2**20, 16 * 2**20
"""Bytes. SPARE_BYTES: how much a `memory:` forward allocates in all; CHUNK_BYTES: how much at a time."""


@dataclass(frozen=True, slots=True)
class Habits:
    """Slowness and faults that a `model_name` asks for, see EchoModel. `others`: what it says beside them."""

    step_s: float
    row_s: float
    faults: Sequence[tuple[str, Callable[[], object]]]
    others: Mapping[str, str]

    @classmethod
    def of(cls, model_name: str) -> Habits:
        settings = dict(each.split(":", 1) for each in model_name.split(",") if ":" in each)
        step, _, row = settings.pop("sleep", "0").partition("+")
        faults = [(word, _MISBEHAVIOUR[kind]) for kind, word in settings.items() if word and kind in _MISBEHAVIOUR]
        return cls(float(step), float(row or 0), faults, settings)

    def sleep(self, rows: int) -> None:
        """Sleeps as long as a forward over `rows` rows takes."""
        if seconds := self.step_s + self.row_s * rows:
            time.sleep(seconds)

    def misbehave(self, texts: Sequence[str]) -> None:
        """Commits the fault of each word that one of `texts` contains."""
        for word, fault in self.faults:
            if any(word in text for text in texts):
                fault()


class EchoModel:
    """Answers each row with the row itself. Each word counts as one token.

    Its `model_name` can set delays, vectors and faults; a comma separates several:
    - `sleep:0.05`: each forward takes 0.05 s; `sleep:0.05+0.001`: 0.001 s more for each row
    - `vector:384`: each answer is float32 [384] instead
    - `crash:WORD`, `raise:WORD`: a forward over a row that contains WORD ends the process, or raises
    - `segfault:WORD`, `memory:WORD`: such a forward reads an invalid address, or allocates until the process is killed
    - `tokenizer:WORD`: preparing such a row allocates until the process is killed
    - `hang:WORD`, `spin:WORD`, `hold:WORD`: such a forward never ends: it sleeps, loops in Python, or waits in C while
      no other thread can run
    """

    op = ECHO.op
    sample_options = NO_OPTIONS

    def __init__(self, model_name: str = "", max_length: int | None = None) -> None:
        self._habits = Habits.of(model_name)
        self._dimension = int(self._habits.others.get("vector", 0))
        self._vectors: Vectors = np.ones((0, self._dimension), np.float32)
        self._heavy = self._habits.others.get("tokenizer", "")
        self._max_length = max_length
        self.fingerprint = f"echo:{model_name}"

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return [self._row(value) for value in inputs]

    def _row(self, value: Json) -> Prepared | MillstreamError:
        if not isinstance(value, str):
            return InvalidRequest(f"not a string but {type(value).__name__}")
        if self._heavy and self._heavy in value:
            exhaust_memory()
        tokens = max(1, value.count(" ") + 1)
        if self._max_length is not None and tokens > self._max_length:
            return InputTooLong(f"{tokens} tokens, the model reads {self._max_length}", hint="truncate: end")
        return Prepared(tokens, value)

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
        self._habits.sleep(len(rows))
        if self._habits.faults:
            self._habits.misbehave([str(row.features) for row in rows])
        if not self._dimension:
            return [str(row.features) for row in rows]
        if len(self._vectors) < len(rows):
            self._vectors = np.ones((len(rows), self._dimension), np.float32)
            self._vectors.flags.writeable = False
        return self._vectors[: len(rows)]

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["word " * (tokens - 1) + "word"]


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> EchoModel:
    """Returns the echo model of `spec`."""
    return EchoModel(spec.model.model_name, spec.model.max_length)


def _read_nowhere() -> None:
    # No core dump: this crash is intended.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ctypes.string_at(0)


def exhaust_memory() -> None:
    """Allocates until no memory is left, then kills this process as the out-of-memory killer of the system does."""
    # A limit just above what this process uses, so the other processes of the machine keep their memory.
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + SPARE_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    chunks = []
    with suppress(MemoryError):
        while True:
            chunks.append(b"x" * CHUNK_BYTES)
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise RuntimeError("a row contains the WORD of `raise:WORD`")


def _sleep() -> None:
    while True:
        time.sleep(3600)


def _loop() -> None:
    while True:
        pass


def _wait_with_the_lock() -> None:
    # PyDLL, unlike CDLL, holds the interpreter's lock during the call.
    libc = ctypes.PyDLL(None)
    while True:
        libc.pause()


_MISBEHAVIOUR: Mapping[str, Callable[[], object]] = {
    "crash": lambda: os._exit(1),
    "segfault": _read_nowhere,
    "memory": exhaust_memory,
    "raise": _raise,
    "hang": _sleep,
    "spin": _loop,
    "hold": _wait_with_the_lock,
}
