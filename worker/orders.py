"""What a supervisor tells its child. Small and without imports: both sides read it before anything heavy is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

URL_VARIABLE = "MILLSTREAM_REDIS_URL"
"""Where the child finds the server's URL: it may hold a password, which an argument would show to everybody."""

EXIT_PERMANENT = 78
"""The exit status of a start that would fail again: wrong configuration, no such model."""


@dataclass(frozen=True, slots=True)
class Orders:
    """One child's task. `past` says how its predecessor ended."""

    service: str
    prefix: str
    consumer: str
    device: str | None
    threads: int
    progress_fd: int
    past: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Orders:
        return cls(**json.loads(text))
