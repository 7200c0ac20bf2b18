"""Address and names of the dashboard, and whether they are safe. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from millstream.broker.contract.errors import ConfigError
from millstream.gateway.addresses import accepted_names, is_loopback

ROUTES = frozenset({"static", "services", "workers", "healthz"})
"""Begins of the dashboard's own paths."""

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9_.~-]+)*")


@dataclass(frozen=True, slots=True)
class Settings:
    """How the dashboard serves.

    `root_path` is the path under which a proxy shows it, "" for none. `hosts` are the names that a Host header may
    have; if it is empty, any. `read_only`: nobody may act.
    """

    root_path: str = ""
    hosts: frozenset[str] = frozenset()
    read_only: bool = False


def make_settings(
    host: str, *, has_users: bool, root_path: str = "", allowed_hosts: tuple[str, ...] = (), read_only: bool = False
) -> Settings:
    """Returns the settings to listen on `host`. Raises ConfigError if that is not safe or `root_path` is not valid.

    Without users whoever connects may act, so the address must be a loopback one, and the Host header must name this
    host: otherwise a page of another site could reach the dashboard through a name that it lets point here.
    """
    if not is_loopback(host) and not has_users:
        raise ConfigError(
            f"the dashboard would listen on {host} without passwords: everybody who can reach it could empty the queue",
            hint="name a --password-file, or leave --host out and use a proxy or an SSH tunnel",
        )
    root_path = root_path.rstrip("/")
    if not _ROOT_PATH.fullmatch(root_path) or root_path.split("/")[1:2] in [[each] for each in ROUTES]:
        raise ConfigError(f"--root-path {root_path!r} cannot be used", hint="such as /queues")
    return Settings(root_path, accepted_names(host, allowed_hosts), read_only)
