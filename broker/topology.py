"""What a Redis URL names: one server, a master that Sentinels name, or a Cluster; and one client's way to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

import redis
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry

from millstream.broker.access import PASSWORD_FILE, FilePassword, check_tls_files, split_password_file
from millstream.broker.cluster import Address, ClusterClient, Slots
from millstream.broker.ownpool import OwnPool
from millstream.broker.packer import Packer
from millstream.broker.sentinel import master_client, watchers

ACCEPTED = (
    "use redis://host:port/db, rediss://host:port/db (TLS), unix:///path/to/socket, "
    "redis+sentinel://host:port,host:port/MASTER_NAME/db or redis+cluster://host:port,host:port "
    "(rediss+sentinel:// and rediss+cluster:// for TLS)"
)

_CONNECT_TIMEOUT_S = 2.0
_ASK_TIMEOUT_S = 2.0
"""For one answer of one Sentinel, or of one node about the whole Cluster: another may be asked."""

_HEALTH_CHECK_S = 30
_MAX_CONNECTIONS = 1024
_PACKER = Packer()

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

# Without it every new connection sends two CLIENT SETINFO, which servers before 7.2 answer with an error.
_NO_SETINFO: dict[str, None] = (
    {"driver_info": None} if hasattr(redis, "driver_info") else {"lib_name": None, "lib_version": None}
)


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL names. `addresses` are a Cluster's nodes or the Sentinels; `master` is the name they know it by."""

    kind: Kind
    url: str
    addresses: Sequence[Address] = ()
    master: str = ""

    def node_url(self, address: Address, *, user: bool = True) -> str:
        """The URL of one server of many, with what the whole says of user, database and TLS."""
        parts = urlsplit(self.url)
        host, port = address
        options = _flat_options(parts)
        hidden = {"sentinel_username", "sentinel_password"} | (set() if user else {"username", "password"})
        kept = urlencode({name: value for name, value in options.items() if name not in hidden})
        where = f"{_userinfo(parts) if user else ''}{f'[{host}]' if ':' in host else host}:{port}"
        database = _path(parts)[1:] if self.kind == "sentinel" and user else []
        return f"{parts.scheme.partition('+')[0]}://{where}/{''.join(database)}{'?' if kept else ''}{kept}"

    def sentinel_url(self, address: Address) -> str:
        """The URL of one Sentinel: a user and a password of its own, or none."""
        plain, _, query = self.node_url(address, user=False).partition("?")
        options = _flat_options(urlsplit(self.url))
        own = {name: options[f"sentinel_{name}"] for name in _USER if f"sentinel_{name}" in options}
        both = "&".join(each for each in (query, urlencode(own)) if each)
        return f"{plain}{'?' if both else ''}{both}"


def read_url(url: str) -> Place:
    """What `url` names. Raises ValueError; its message quotes nothing: a piece may be the password."""
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError("it cannot be parsed (percent-encode special characters in the password)") from None
    kind = _KINDS.get(parts.scheme)
    if kind is None:
        raise ValueError("the scheme is not known")
    place = _single(url, parts) if kind == "single" else _many(url, parts, kind)
    if unknown := set(options) - _OPTIONS[kind] - (_TLS if parts.scheme.startswith("rediss") else set()):
        raise ValueError(f"{', '.join(sorted(unknown))} cannot be set here")
    return place


def redacted(url: str) -> str:
    """`url` without its password, also where it is malformed."""
    without_userinfo = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&#]*", r"\1***", without_userinfo)


class Open(Protocol):
    """Makes clients whose commands take at most `timeout_s`; `own` ones are used by one thread only."""

    def __call__(self, timeout_s: float, *, own: bool = False) -> redis.Redis: ...


def opener(place: Place, name: str, opened: Callable[[redis.Redis], None]) -> Open:
    """A function that makes clients.

    `opened` gets every client that has sockets, now or later, to close it. What is learned of the nodes is shared.
    Raises ConfigError where a file that the URL names cannot be used.
    """
    check_tls_files(place.url)
    bare, password = split_password_file(place.url)
    place = replace(place, url=bare)

    def one(
        url: str,
        timeout_s: float,
        password: FilePassword | None = password,
        pool: type[ConnectionPool] = ConnectionPool,
    ) -> redis.Redis:
        return redis.Redis.from_pool(pool.from_url(url, **_settings(url, name, timeout_s, password)))

    def kept(client: redis.Redis) -> redis.Redis:
        opened(client)
        return client

    if place.kind == "single":
        return lambda timeout_s, own=False: kept(one(place.url, timeout_s, pool=OwnPool if own else ConnectionPool))
    if place.kind == "sentinel":
        watching = watchers([one(place.sentinel_url(each), _ASK_TIMEOUT_S, None) for each in place.addresses])
        for watcher in watching.sentinels:
            opened(watcher)
        url = place.node_url(place.addresses[0])
        return lambda timeout_s, own=False: kept(
            master_client(watching, place.master, url, _settings(url, name, timeout_s, password))
        )
    slots = Slots(place.addresses, lambda address: one(place.node_url(address), _ASK_TIMEOUT_S))
    return lambda timeout_s, own=False: ClusterClient(
        slots, lambda address: kept(one(place.node_url(address), timeout_s)), place.node_url(place.addresses[0])
    )


def _settings(url: str, name: str, timeout_s: float, password: FilePassword | None) -> dict[str, object]:
    # RESP2: the scripts' and XREADGROUP's answers keep one shape from Redis 6.2 to Valkey 9.
    # No retries: the library's own re-send writes, and wait ten times longer than a block.
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    return {
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": _HEALTH_CHECK_S,
        "max_connections": _MAX_CONNECTIONS,
        "client_name": name,
        "command_packer": _PACKER,
        **({"credential_provider": password} if password else {}),
        **keepalive,
        **_NO_SETINFO,
    }


def _single(url: str, parts: SplitResult) -> Place:
    try:
        port = parts.port
        named = _flat_options(parts).get("db", parts.path.strip("/") or "0")
        database = int(named) if parts.scheme != "unix" else 0
    except ValueError:
        raise ValueError("it cannot be parsed (percent-encode special characters in the password)") from None
    if parts.scheme == "unix" and (parts.hostname or len(parts.path) < 2):
        raise ValueError("it names no absolute socket path")
    if parts.scheme != "unix" and (not parts.hostname or port == 0 or database < 0):
        raise ValueError("it names no host, port or database")
    return Place("single", url)


def _many(url: str, parts: SplitResult, kind: Kind) -> Place:
    addresses = list(_addresses(parts.netloc.rpartition("@")[2], _PORTS[kind]))
    path = _path(parts)
    if kind == "cluster":
        if path not in ([], ["0"]):
            raise ValueError("a Cluster has database 0 only, and nothing else follows its hosts")
        return Place(kind, url, addresses)
    database = path[1] if len(path) == 2 else _flat_options(parts).get("db", "0")
    # A number alone is taken for a database whose master was forgotten.
    if len(path) not in (1, 2) or path[0].isdecimal() or not database.isdecimal():
        raise ValueError("it names no master: /MASTER_NAME or /MASTER_NAME/db follows the hosts")
    return Place(kind, url, addresses, path[0])


def _addresses(hosts: str, default_port: int) -> Iterator[Address]:
    for each in hosts.split(","):
        try:
            parts = urlsplit(f"//{each}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or port == 0 or parts.path or parts.query:
            raise ValueError("its hosts are not host:port, separated by commas")
        yield host, port or default_port


def _path(parts: SplitResult) -> list[str]:
    return [step for step in parts.path.split("/") if step]


def _userinfo(parts: SplitResult) -> str:
    user, at, _ = parts.netloc.rpartition("@")
    return user + at


def _flat_options(parts: SplitResult) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
