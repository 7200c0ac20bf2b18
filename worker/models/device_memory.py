"""Measures and frees the memory of a CUDA device, as memory_use.py does for that of the process."""

from __future__ import annotations

import torch

from millstream.worker.measuring.memory_use import ProcessMemory


class CudaMemory(ProcessMemory):
    """Memory that this process has reserved on one CUDA device, torch's cache included."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def used(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_reserved(self._device))

    def free(self) -> None:
        super().free()
        torch.cuda.empty_cache()
