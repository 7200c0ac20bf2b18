"""Reads a Redis URL: one server, a master that Sentinels name, or a Cluster. Pure, and imports no client."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlencode, urlsplit

ACCEPTED = (
    "use redis://host:port/db, rediss://host:port/db (TLS), unix:///path/to/socket, "
    "redis+sentinel://host:port,host:port/MASTER_NAME/db or redis+cluster://host:port,host:port "
    "(rediss+sentinel:// and rediss+cluster:// for TLS)"
)
PASSWORD_FILE = "password_file"
"""Name of the URL option for a password file. The first line of that file is the password."""

Address = tuple[str, int]
Kind = Literal["single", "sentinel", "cluster"]
_PORTS: Mapping[Kind, int] = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_KINDS: Mapping[str, Kind] = {
    "unix": "single",
    "redis": "single",
    "rediss": "single",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}
_USER = {"username", "password"}
_OPTIONS: Mapping[Kind, set[str]] = {
    "single": _USER | {PASSWORD_FILE, "db"},
    "sentinel": _USER | {PASSWORD_FILE, "db", "sentinel_username", "sentinel_password"},
    "cluster": _USER | {PASSWORD_FILE},
}
_TLS = {
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_keyfile",
    "ssl_password",
}
_CERT_REQS = ("none", "optional", "required")

_UNPARSABLE = "it cannot be parsed (percent-encode special characters in the password)"
_UNFILLED = re.compile(r"\$\{[^}]*\}|\$\([^)]*\)|\{\{.*?\}\}|^\$\w+$|(?<=@)\$\w+|(?<=//)\$\w+(?=[:/]|$)")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The servers of a URL.

    `addresses` are a Cluster's nodes or the Sentinels; `master` is the name by which the Sentinels know the master.
    """

    kind: Kind
    url: str
    addresses: Sequence[Address] = ()
    master: str = ""

    def node_url(self, address: Address, *, user: bool = True) -> str:
        """Returns the URL of one server of several, with the user, database and TLS options of the whole URL."""
        parts = urlsplit(self.url)
        host, port = address
        options = _flat_options(parts)
        hidden = {"sentinel_username", "sentinel_password"} | (set() if user else {"username", "password"})
        query = urlencode({name: value for name, value in options.items() if name not in hidden})
        where = f"{_userinfo(parts) if user else ''}{f'[{host}]' if ':' in host else host}:{port}"
        database = _path(parts)[1:] if self.kind == "sentinel" and user else []
        return f"{parts.scheme.partition('+')[0]}://{where}/{''.join(database)}{'?' if query else ''}{query}"

    def sentinel_url(self, address: Address) -> str:
        """Returns the URL of one Sentinel, with `sentinel_username` and `sentinel_password` as its user, if set."""
        plain, _, query = self.node_url(address, user=False).partition("?")
        options = _flat_options(urlsplit(self.url))
        own = {name: options[f"sentinel_{name}"] for name in _USER if f"sentinel_{name}" in options}
        both = "&".join(each for each in (query, urlencode(own)) if each)
        return f"{plain}{'?' if both else ''}{both}"


def canonical(url: str) -> str:
    """Returns `url` in the spelling that the library and other programs accept.

    Removes spaces around the URL and around the commas between hosts, writes the scheme in lower case, and unix:/path
    as unix:///path. Changes nothing else, so that `read_url` still finds every error.
    """
    scheme, colon, rest = url.strip().partition(":")
    scheme = scheme.lower()
    if scheme == "unix" and rest.startswith("/") and not rest.startswith("//"):
        rest = f"//{rest}"
    if scheme.endswith(("+cluster", "+sentinel")):
        rest = re.sub(r"\s*,\s*", ",", rest)
    return f"{scheme}{colon}{rest}" if scheme in _KINDS else url.strip()


def read_url(url: str) -> Endpoint:
    """Returns the endpoint that `url` names, in any spelling that `canonical` accepts.

    Raises ValueError if `url` is invalid. The message quotes only names of variables and options: any other part may
    be the password.
    """
    url = canonical(url)
    _check_characters(url)
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError(_UNPARSABLE) from None
    kind = _KINDS.get(parts.scheme)
    if kind is None:
        raise ValueError("the scheme is not known")
    if not url.startswith(f"{parts.scheme}://"):
        raise ValueError("no :// follows the scheme")
    if parts.fragment:
        raise ValueError("it has a # (percent-encode special characters in the password)")
    endpoint = _single(url, parts) if kind == "single" else _many(url, parts, kind)
    if unknown := set(options) - _OPTIONS[kind] - (_TLS if parts.scheme.startswith("rediss") else set()):
        raise ValueError(f"{', '.join(sorted(unknown))} cannot be set here")
    if "ssl_cert_reqs" in options and options["ssl_cert_reqs"][0] not in _CERT_REQS:
        raise ValueError(f"ssl_cert_reqs must be one of {', '.join(_CERT_REQS)}")
    return endpoint


def redacted(url: str) -> str:
    """Returns `url` with *** in the place of its password, even if the URL is malformed."""
    without_userinfo = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&#]*", r"\1***", without_userinfo)


def _check_characters(url: str) -> None:
    if not url:
        raise ValueError("it is empty")
    if found := _UNFILLED.search(url):
        name = found[0] if re.fullmatch(r"\$\w+|\$\{\w+\}", found[0]) else "a variable"
        raise ValueError(f"it contains {name}, which nothing has replaced by its value: no variable is expanded here")
    if re.search(r"[\s\x00-\x1f\x7f]", url) or "\0" in unquote(url):
        raise ValueError("it has a space, a line break or a control character inside")


def _single(url: str, parts: SplitResult) -> Endpoint:
    database = _flat_options(parts).get("db", "0" if parts.scheme == "unix" else parts.path.strip("/") or "0")
    if not re.fullmatch(r"[0-9]{1,9}", database):
        raise ValueError("its database is not a number (percent-encode special characters in the password)")
    if parts.scheme == "unix":
        if parts.hostname or len(parts.path) < 2:
            raise ValueError("it names no absolute socket path")
    else:
        _check_host(_hostname(parts), _port(parts, _PORTS["single"]))
    return Endpoint("single", url)


def _many(url: str, parts: SplitResult, kind: Kind) -> Endpoint:
    addresses = list(_addresses(parts.netloc.rpartition("@")[2], _PORTS[kind]))
    path = _path(parts)
    if kind == "cluster":
        if path not in ([], ["0"]):
            raise ValueError("a Cluster has only database 0, and nothing else follows its hosts")
        return Endpoint(kind, url, addresses)
    database = path[1] if len(path) == 2 else _flat_options(parts).get("db", "0")
    # A number alone is a database: the name of the master is missing.
    if len(path) not in (1, 2) or path[0].isdecimal() or not database.isdecimal():
        raise ValueError("it names no master: /MASTER_NAME or /MASTER_NAME/db follows the hosts")
    return Endpoint(kind, url, addresses, path[0])


def _addresses(hosts: str, default_port: int) -> Iterator[Address]:
    for each in hosts.split(","):
        try:
            parts = urlsplit(f"//{each}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or port == 0 or parts.path or parts.query:
            raise ValueError("its hosts are not host:port, separated by commas")
        _check_host(host, port or default_port)
        yield host, port or default_port


def _hostname(parts: SplitResult) -> str:
    host = parts.hostname
    if not host:
        raise ValueError("it names no host (percent-encode special characters in the password)")
    return host


def _port(parts: SplitResult, default: int) -> int:
    try:
        port = parts.port
    except ValueError:
        raise ValueError(
            "its port is not a number from 1 to 65535 (percent-encode special characters in the password)"
        ) from None
    return default if port is None else port


def _check_host(host: str, port: int) -> None:
    if not port:
        raise ValueError("its port is not a number from 1 to 65535")
    try:
        # The socket encodes the name the same way, and raises UnicodeError for a label that is empty or too long.
        host.encode("idna")
    except UnicodeError:
        raise ValueError("its host is not a valid name") from None


def _path(parts: SplitResult) -> list[str]:
    return [step for step in parts.path.split("/") if step]


def _userinfo(parts: SplitResult) -> str:
    user, at, _ = parts.netloc.rpartition("@")
    return user + at


def _flat_options(parts: SplitResult) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
