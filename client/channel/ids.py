"""Ids of jobs and calls: 128 random bits, so that they do not collide, and quick to make."""

from __future__ import annotations

import os
import random
import secrets

_random = random.Random(secrets.randbits(256))

# Without a new seed a forked child would make the same ids as its parent.
os.register_at_fork(after_in_child=lambda: _random.seed(secrets.randbits(256)))


def new_id() -> str:
    """Returns 32 hexadecimal digits. Not a secret: the system's own generator would cost a system call for each job."""
    return f"{_random.getrandbits(128):032x}"
