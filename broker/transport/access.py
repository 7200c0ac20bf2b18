"""Reads the password from a file, and refuses a server on another host that has neither TLS nor a password.

A URL names the password file in its option `password_file`. Child processes get the URL in their environment, but not
the password. The file is read at each new connection, so a password can be changed while workers and clients run.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from redis import CredentialProvider

from millstream.broker.config.url import PASSWORD_FILE, canonical
from millstream.broker.config.variables import INSECURE_VARIABLE, PASSWORD_FILE_VARIABLE
from millstream.broker.contract.errors import ConfigError

if TYPE_CHECKING:
    from millstream.broker.config.load import Config

log = logging.getLogger(__name__)

_MOST_BYTES = 4096
"""Bytes of a password file that are read at most."""


class FilePassword(CredentialProvider):
    """The user of a URL, with the password that the file holds at the time of each connection.

    The constructor raises ConfigError if the file is missing, unreadable, empty or not text. If that happens later, the
    last password is used: the file may be in the middle of a replacement, and a worker must not end because of that.
    """

    def __init__(self, user: str, file: Path) -> None:
        self._user = user
        self._file = file
        self._last = read_password(file)

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            self._last = read_password(self._file)
        except ConfigError as error:
            log.warning("%s; trying the last password that was read", error)
        return (self._user, self._last) if self._user else (self._last,)

    def __repr__(self) -> str:
        return f"FilePassword({self._user!r}, {os.fspath(self._file)!r})"


def read_password(file: Path) -> str:
    """Returns the first line of `file`. Raises ConfigError if it cannot be read, is empty or is not text.

    Warns once per file if everybody on the host can read it.
    """
    try:
        with file.open("rb") as stream:
            others_may_read = os.fstat(stream.fileno()).st_mode & stat.S_IROTH
            lines = stream.read(_MOST_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"the password file {file} cannot be read: {reason}", hint=_NAMED_BY) from None
    if not lines or not lines[0]:
        raise ConfigError(f"the password file {file} is empty", hint="its first line is the password")
    if others_may_read and file not in _warned_files:
        _warned_files.add(file)
        log.warning("the password file %s can be read by everybody on this host: chmod o-r it", file)
    return lines[0]


_NAMED_BY = f"{PASSWORD_FILE_VARIABLE}, redis.password_file in config.yaml or ?{PASSWORD_FILE}= in the URL names it"
_warned_files: set[Path] = set()


def without_password_file(url: str) -> str:
    """Returns `url` without its option `password_file`, which other programs do not know."""
    base, _, query = url.partition("?")
    rest = urlencode(
        [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name != PASSWORD_FILE]
    )
    return f"{base}?{rest}" if rest else base


def split_password_file(url: str) -> tuple[str, FilePassword | None]:
    """Returns `url` as the library accepts it, and the credentials of its password file.

    If `url` names no password file, returns it unchanged, and None. Otherwise the user is removed from the URL, because
    the credentials have it. Raises ConfigError if the file cannot be read, or if the URL also has a password.
    """
    file = _options(url).get(PASSWORD_FILE)
    if file is None:
        return url, None
    if _has_password(url):
        raise ConfigError("the Redis URL has both a password and a password file", hint="leave one of them out")
    scheme, _, rest = without_password_file(url).partition("://")
    netloc, slash, path = rest.partition("/")
    user, _, hosts = netloc.rpartition("@")
    return f"{scheme}://{hosts}{slash}{path}", FilePassword(unquote(user), Path(file))


def check_tls_files(url: str) -> None:
    """Checks the certificate and key files that `url` names. Raises ConfigError if one cannot be read."""
    for option, path in _options(url).items():
        if option in _TLS_FILES and not os.access(path, os.R_OK):
            raise ConfigError(
                f"{option} in the Redis URL names {path}, which cannot be read",
                hint="give an absolute path to a file that this user can read",
            )


_TLS_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")


def secured(url: str, config: Config | None, environ: Mapping[str, str]) -> str:
    """Returns `url` in its canonical spelling, with the password file that the environment or the configuration names.

    Raises ConfigError if `url` leads to another host without TLS and password, unless MILLSTREAM_INSECURE or
    `redis.insecure` allows that.
    """
    url = canonical(url)
    try:
        urlsplit(url)
    except ValueError:
        return url  # `Connection` reports the error
    file = environ.get(PASSWORD_FILE_VARIABLE) or (config and config.redis.password_file)
    if file and not _has_password(url) and PASSWORD_FILE not in _options(url):
        named = f"{PASSWORD_FILE}={quote(os.path.abspath(Path(file).expanduser()))}"
        url = f"{url}{'&' if urlsplit(url).query else '?'}{named}"
    forced = is_true(environ.get(INSECURE_VARIABLE, "")) or bool(config and config.redis.insecure)
    if not forced and (host := open_host(url)):
        raise ConfigError(
            f"Redis on {host} would be used over the network without TLS and without a password: "
            "everybody who can reach it controls the queue",
            hint="give it a password or ACL users (`millstream acl`, redis.password_file), or TLS (rediss://); "
            f"{INSECURE_VARIABLE}=1 or `redis: {{insecure: true}}` uses it as it is",
        )
    return url


def open_host(url: str) -> str:
    """Returns the first host of `url` that is not this one and has neither TLS nor a password, or an empty string."""
    parts = urlsplit(url)
    if not parts.scheme.startswith("redis") or parts.scheme.startswith("rediss") or _has_password(url):
        return ""
    if PASSWORD_FILE in _options(url):
        return ""
    return next((host for host in _hosts(parts.netloc) if not _is_loopback(host)), "")


def _options(url: str) -> dict[str, str]:
    return dict(parse_qsl(url.partition("?")[2]))


def _has_password(url: str) -> bool:
    return ":" in urlsplit(url).netloc.rpartition("@")[0] or bool(_options(url).get("password"))


def _hosts(netloc: str) -> list[str]:
    """Returns each host without its port. A URL of Sentinels or of a Cluster names several."""
    hosts = netloc.rpartition("@")[2].split(",")
    return [
        host[1 : host.index("]")] if host.startswith("[") and "]" in host else host.partition(":")[0] for host in hosts
    ]


def _is_loopback(host: str) -> bool:
    """Returns whether `host` is this host. An unknown name counts as this host: connecting to it reports the reason."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def is_true(text: str) -> bool:
    """Returns whether the text of an environment variable is 1, true, yes or on, in any case."""
    return text.strip().lower() in ("1", "true", "yes", "on")
