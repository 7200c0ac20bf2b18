"""What a supervisor tells its child. Small and without imports: both sides read it before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass

URL_VARIABLE = "MILLSTREAM_REDIS_URL"
"""Where the child finds the server's URL: it may hold a password, which an argument would show to everybody."""

EXIT_PERMANENT = 78
"""The exit status of a start that would fail again: wrong configuration, no such model."""


def new_consumer() -> str:
    """A name for a worker process that no other has: its host, who named it, and chance."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class ChildArgs:
    """One child's task. `past` says how its predecessor ended.

    `handler` is the code of a custom model, and `folder` where its configuration file stands. `supervised`: somebody
    reads the page after the child's death.
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
