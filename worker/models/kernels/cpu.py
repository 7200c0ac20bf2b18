"""The threads on which torch computes."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Make the calling thread's operations run on `count` threads. Others keep what they have."""
    torch.set_num_threads(count)
