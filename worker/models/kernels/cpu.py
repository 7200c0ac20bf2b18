"""Sets the threads that torch computes with."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Makes operations of the calling thread run on `count` threads. Other threads keep their number."""
    torch.set_num_threads(count)
