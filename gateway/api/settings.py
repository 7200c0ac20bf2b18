"""Limits and names of the HTTP API, and whether its address is safe. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from millstream.broker.contract.errors import ConfigError
from millstream.gateway.addresses import accepted_names, is_loopback

MAX_BODY = 16 * 2**20
"""Bytes of a request's body at most, by default."""

MAX_PENDING = 1_024
"""Calls that one process holds while the queue's server is away, by default."""

DRAIN_S = 30.0
"""Seconds that open requests get when a process is stopped, by default."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the API serves. A process that is started gets it as it is, so all fields are plain values.

    `url` and `prefix` name the queue's server and its keys. `keys` is the file of API keys; None: whoever connects may
    do all. `hosts` are the names that a Host header may have; empty for any. `origins` are those of web pages that may
    call (CORS). `max_body` is in bytes, `drain_s` in seconds.
    """

    url: str
    prefix: str
    keys: Path | None = None
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY
    max_pending: int = MAX_PENDING
    drain_s: float = DRAIN_S


def check_address(host: str, has_keys: bool, allowed_hosts: tuple[str, ...]) -> frozenset[str]:
    """Returns the names that a Host header may have. Raises ConfigError if it is not safe to listen on `host`."""
    if not is_loopback(host) and not has_keys:
        raise ConfigError(
            f"the API would listen on {host} without keys: everybody who can reach it could call all services",
            hint="name a file of --keys (`millstream key add` makes one), or leave --host out",
        )
    return accepted_names(host, allowed_hosts)
