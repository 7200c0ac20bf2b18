"""One process's way to one Redis server: finding it, clients with our own timeouts, checking its version."""

from __future__ import annotations

# Else imported at the first connection: a process forked meanwhile would wait for that import for ever.
import encodings.idna  # noqa: F401
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from millstream.broker.datadir import default_data_dir
from millstream.broker.embedded import running
from millstream.broker.engine import FLOORS, EngineName, Version, floor_text, parse_version, version_text
from millstream.broker.errors import BrokerUnavailable, ConfigError
from millstream.broker.faults import START_ONE, URL_VARIABLE, is_transient, retrying, translated

if TYPE_CHECKING:
    from millstream.broker.config import Config

__all__ = ["Connection", "ServerInfo", "check", "find_url", "is_transient", "redacted", "retrying", "translated"]

_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 2.0
_BLOCK_GRACE_S = 3.0
_HEALTH_CHECK_S = 30
_MAX_CONNECTIONS = 1024

_ACCEPTED = "use redis://host:port/db, rediss://host:port/db (TLS) or unix:///path/to/socket"
_IDENTITY = {"db", "username", "password"}
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


class Connection:
    """The clients of one process to one server. Thread-safe and fork-safe: a child process opens sockets of its own.

    `name` shows in CLIENT LIST. Raises ConfigError where `url` is not one of the accepted forms; connects on first use.
    """

    def __init__(self, url: str, *, name: str = "millstream") -> None:
        self.safe_url = redacted(url)
        if problem := _problem(url):
            raise ConfigError(f"bad Redis URL {self.safe_url}: {problem}", hint=_ACCEPTED)
        self.url = url
        self._name = name
        self._clients: list[redis.Redis] = []
        self.client = self._open(_TIMEOUT_S)
        """For plain commands. It never sends a command again by itself: whoever may repeat one uses `retrying`."""

    def blocking(self, block_s: float) -> redis.Redis:
        """A client for commands that block for at most `block_s` seconds: one for a thread's life, not one a call."""
        return self._open(block_s + _BLOCK_GRACE_S)

    def close(self) -> None:
        """Close every socket; a thread that blocks on one gets an error at once."""
        for client in list(self._clients):
            client.close()

    def after_fork(self) -> None:
        """In a forked child: clients of its own; the parent's sockets are left alone."""
        # To close an inherited client would wait for the lock of its pool, which a thread of the parent may have held.
        for client in self._clients:
            client.auto_close_connection_pool = False
        self._clients = []
        self.client = self._open(_TIMEOUT_S)

    def __repr__(self) -> str:
        return f"Connection({self.safe_url!r})"

    def _open(self, timeout_s: float) -> redis.Redis:
        # RESP2: the scripts' and XREADGROUP's answers keep one shape from Redis 6.2 to Valkey 9.
        # No retries: the library's own re-send writes, and wait ten times longer than a block.
        keepalive = {} if self.url.startswith("unix:") else {"socket_keepalive": True}
        client: redis.Redis = redis.Redis.from_url(
            self.url,
            protocol=2,
            decode_responses=False,
            socket_timeout=timeout_s,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=_HEALTH_CHECK_S,
            max_connections=_MAX_CONNECTIONS,
            client_name=self._name,
            **keepalive,
            **_NO_SETINFO,
        )
        self._clients.append(client)
        return client


def redacted(url: str) -> str:
    """`url` without its password, also where it is malformed."""
    without_userinfo = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&#]*", r"\1***", without_userinfo)


def _problem(url: str) -> str:
    """What is wrong with `url`, or an empty string. It quotes nothing: a piece may be the password."""
    try:
        parts = urlsplit(url)
        port = parts.port
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        database = int(options.get("db", [parts.path.strip("/") or "0"])[0]) if parts.scheme != "unix" else 0
    except ValueError:
        return "it cannot be parsed (percent-encode special characters in the password)"
    if parts.scheme not in ("redis", "rediss", "unix"):
        return "the scheme is not known"
    if parts.scheme == "unix" and (parts.hostname or len(parts.path) < 2):
        return "it names no absolute socket path"
    if parts.scheme != "unix" and (not parts.hostname or port == 0 or database < 0):
        return "it names no host, port or database"
    if unknown := set(options) - _IDENTITY - (_TLS if parts.scheme == "rediss" else set()):
        return f"{', '.join(sorted(unknown))} cannot be set here"
    return ""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What kind of server answers."""

    engine: EngineName
    version: Version


def check(connection: Connection) -> ServerInfo:
    """Ask the server what it is. Raises ConfigError where it is older than millstream needs, and BrokerUnavailable."""
    with translated(connection.safe_url):
        answer: Mapping[str, object] = connection.client.info("server")
    info = server_info(answer)
    if info.version < FLOORS[info.engine]:
        raise ConfigError(
            f"{connection.safe_url} is {info.engine} {version_text(info.version)}, which is too old",
            hint=f"{floor_text(info.engine)} is the oldest supported",
        )
    return info


def server_info(answer: Mapping[str, object]) -> ServerInfo:
    """Read INFO's answer. Valkey also gives a redis_version, the one it forked from."""
    if "valkey_version" in answer:
        return ServerInfo("valkey", parse_version(str(answer["valkey_version"])))
    return ServerInfo("redis", parse_version(str(answer.get("redis_version", ""))))


def find_url(flag: str | None, config: Config | None, environ: Mapping[str, str]) -> str:
    """The server to use: the flag's, MILLSTREAM_REDIS_URL's, the configuration's, or the local one that is running.

    Raises BrokerUnavailable where there is none.
    """
    configured = config.redis.url if config else None
    url = flag or environ.get(URL_VARIABLE) or configured or running(_data_dir(config, environ))
    if not url:
        raise BrokerUnavailable("no Redis server is configured, and no local one is running", hint=START_ONE)
    return url


def _data_dir(config: Config | None, environ: Mapping[str, str]) -> Path:
    if config and config.redis.data_dir and not environ.get("MILLSTREAM_DATA_DIR"):
        return config.redis.data_dir
    return default_data_dir(environ)
