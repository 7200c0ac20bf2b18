"""Measures the memory of this process: what it uses now, and the most since a moment. Sizes of models come from it."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from millstream.worker.free_memory import give_back_free_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"
"""Written to _RESET, makes the system note the peak anew."""


class Meter(Protocol):
    """Memory in which models lie, bytes."""

    def used(self) -> int:
        """Bytes in use now; 0 if they are not known."""
        ...

    def begin(self) -> None:
        """Notes the peak from now on."""
        ...

    def peak(self) -> int:
        """Most bytes in use since `begin`; 0 if they are not known."""
        ...

    def free(self) -> None:
        """Gives back what nothing refers to any more."""
        ...


class ProcessMemory:
    """The resident set of this process: all that it has in memory, mapped files and prepacked copies included.

    It is known on Linux only.
    """

    def used(self) -> int:
        return _field("VmRSS")

    def begin(self) -> None:
        # If it is not allowed, the peak is that of the process's life: too large rather than too small.
        with suppress(OSError):
            _RESET.write_text(_PEAK)

    def peak(self) -> int:
        return _field("VmHWM")

    def free(self) -> None:
        # The collector does not look at frozen objects, and a load has frozen the model.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        give_back_free_memory()


def _field(name: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
