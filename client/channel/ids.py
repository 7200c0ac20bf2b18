"""Names for jobs, callers' calls among them: random enough to meet nobody else's, and quick to make."""

from __future__ import annotations

import os
import random
import secrets

_chance = random.Random(secrets.randbits(256))

# Else a forked child would go on with its parent's numbers.
os.register_at_fork(after_in_child=lambda: _chance.seed(secrets.randbits(256)))


def new_id() -> str:
    """32 hexadecimal digits. Not a secret: the system's own generator would be asked for each job, by a system call."""
    return f"{_chance.getrandbits(128):032x}"
