"""Arguments of a supervisor to its child. A module with light imports only: both import it before torch is loaded."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

EXIT_PERMANENT = 78
"""Exit status of a start that would fail again: wrong configuration, unknown model."""


def new_consumer() -> str:
    """A unique name for a worker process: host, pid of the process that names it, and random digits."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Hosted:
    """One service of a child. `progress_fd`: descriptor of its progress page.

    `handler`: import path of a custom model's code.
    """

    service: str
    progress_fd: int
    handler: str | None = None


@dataclass(frozen=True, slots=True)
class ChildArgs:
    """Arguments of one child, which hosts one or more services. `past`: how its predecessor ended, "" for the first.

    `drain_s`: seconds that its drain may take before it is killed. `folder`: folder of its configuration file.
    `supervised`: a supervisor reads the progress pages after the child's death.
    """

    hosted: Sequence[Hosted]
    prefix: str
    consumer: str
    device: str | None
    threads: int
    past: str = ""
    folder: str = ""
    supervised: bool = True
    drain_s: float = 30.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ChildArgs:
        fields = json.loads(text)
        return cls(**fields | {"hosted": [Hosted(**each) for each in fields["hosted"]]})
