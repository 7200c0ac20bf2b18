"""Address and names of the dashboard, and whether they are safe. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from millstream.broker.contract.errors import ConfigError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names in a Host header that can only mean this host."""

ROUTES = frozenset({"static", "services", "workers", "healthz"})
"""Begins of the dashboard's own paths."""

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9_.~-]+)*")
_PORT = re.compile(r":\d{1,5}")


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
    local = is_loopback(host)
    if not local and not has_users:
        raise ConfigError(
            f"the dashboard would listen on {host} without passwords: everybody who can reach it could empty the queue",
            hint="name a --password-file, or leave --host out and use a proxy or an SSH tunnel",
        )
    root_path = root_path.rstrip("/")
    if not _ROOT_PATH.fullmatch(root_path) or root_path.split("/")[1:2] in [[each] for each in ROUTES]:
        raise ConfigError(f"--root-path {root_path!r} cannot be used", hint="such as /queues")
    names = {name.lower() for name in allowed_hosts}
    if local:
        names |= LOCAL_NAMES | {host.lower()}
    return Settings(root_path, frozenset(names), read_only)


def is_loopback(host: str) -> bool:
    """Returns whether `host` is localhost or a loopback address. Other names count as reachable from elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_name(header: str) -> str:
    """Returns the name in a Host header, without port and brackets, in lower case; "" if the header is malformed."""
    name, _, rest = header[1:].partition("]") if header.startswith("[") else _split_port(header)
    return name.lower() if not rest or _PORT.fullmatch(rest) else ""


def _split_port(header: str) -> tuple[str, str, str]:
    name, colon, port = header.partition(":")
    return name, "", colon + port
