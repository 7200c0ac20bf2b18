"""Arguments of a supervisor to its child. A module with light imports only: both import it before torch is loaded."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass

EXIT_PERMANENT = 78
"""Exit status of a start that would fail again: wrong configuration, unknown model."""


def new_consumer() -> str:
    """A unique name for a worker process: host, pid of the process that names it, and random digits."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class ChildArgs:
    """Arguments of one child. `past`: how its predecessor ended, "" for the first.

    `handler`: import path of a custom model's code. `folder`: folder of its configuration file. `supervised`: a
    supervisor reads the progress page after the child's death.
    """

    service: str
    prefix: str
    consumer: str
    device: str | None
    threads: int
    progress_fd: int
    past: str = ""
    handler: str | None = None
    folder: str = ""
    supervised: bool = True

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ChildArgs:
        return cls(**json.loads(text))
