"""Addresses, host names and origins: what is only reachable from this host, and which page sent a request. Pure."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names in a Host header that can only mean this host."""

_PORT = re.compile(r":\d{1,5}")


def is_loopback(host: str) -> bool:
    """Returns whether `host` is localhost or a loopback address. Other names count as reachable from elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def accepted_names(host: str, allowed: tuple[str, ...]) -> frozenset[str]:
    """Returns the names that a Host header may have if a server listens on `host`; empty for any.

    On a loopback address it must be this host's or an `allowed` one: otherwise a page of another site could reach the
    server through a name that it lets point here.
    """
    names = {name.lower() for name in allowed}
    return frozenset(names | LOCAL_NAMES | {host.lower()} if is_loopback(host) else names)


def in_url(host: str) -> str:
    """Returns `host` as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def host_name(header: str) -> str:
    """Returns the name in a Host header, without port and brackets, in lower case; "" if the header is malformed."""
    name, _, rest = header[1:].partition("]") if header.startswith("[") else _split_port(header)
    return name.lower() if not rest or _PORT.fullmatch(rest) else ""


def _split_port(header: str) -> tuple[str, str, str]:
    name, colon, port = header.partition(":")
    return name, "", colon + port


def is_foreign(fetch_site: str, origin: str, host: str, hosts: frozenset[str]) -> bool:
    """Returns whether the headers Sec-Fetch-Site or Origin say that the request comes from another site's page.

    `host` is the Host header. A proxy may have replaced it; then `hosts`, the allowed names, has the public one.
    Browsers send Sec-Fetch-Site to https and to this host only, and old ones neither header.
    """
    if fetch_site:
        return fetch_site != "same-origin"
    if not origin:
        return False
    source = urlsplit(origin).hostname or ""
    return source.lower() not in {host_name(host), *hosts}
