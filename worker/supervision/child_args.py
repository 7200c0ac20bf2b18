"""Arguments of a supervisor to its child. A module with light imports only: both import it before torch is loaded."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from millstream.broker.contract.keys import HOST_LENGTH
from millstream.worker.pool.args import PoolArgs

if TYPE_CHECKING:
    from millstream.broker.config.spec import ServiceSpec

EXIT_PERMANENT = 78
"""Exit status of a start that would fail again: wrong configuration, unknown model."""


def new_consumer() -> str:
    """A unique name for a worker process: host, pid of the process that names it, and random digits."""
    return f"{socket.gethostname()[:HOST_LENGTH]}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Hosted:
    """One service of a child. `progress_fd`: descriptor of its progress page.

    `handler`: import path of a custom model's code. `key_file`, `key_env`: file or variable that has the key of the
    server at `key_url`, and of no other.
    """

    service: str
    progress_fd: int
    handler: str | None = None
    key_file: str | None = None
    key_env: str | None = None
    key_url: str | None = None

    @classmethod
    def of(cls, spec: ServiceSpec, progress_fd: int) -> Hosted:
        model = spec.model
        key_file = str(model.api_key_file) if model.api_key_file else None
        return cls(spec.name, progress_fd, model.handler, key_file, model.api_key_env, model.url)

    def settings(self, registered: ServiceSpec) -> ServiceSpec:
        """Returns the registered service with what only this host's own file says."""
        own = registered.model.model_copy(
            update={
                "url": self.key_url,
                "api_key_file": Path(self.key_file) if self.key_file else None,
                "api_key_env": self.key_env,
            }
        )
        return registered.with_handler(self.handler).with_key(own)


@dataclass(frozen=True, slots=True)
class ChildArgs:
    """Arguments of one child, which hosts one or more services. `past`: how its predecessor ended, "" for the first.

    `drain_s`: seconds that its drain may take before it is killed. `folder`: folder of its configuration file.
    `supervised`: a supervisor reads the progress pages after the child's death. `pool`: settings of the pool that it is
    a process of, None if all of its models are always in memory.
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
    pool: PoolArgs | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ChildArgs:
        fields = json.loads(text)
        pool = PoolArgs(**fields["pool"]) if fields["pool"] else None
        return cls(**fields | {"hosted": [Hosted(**each) for each in fields["hosted"]], "pool": pool})
