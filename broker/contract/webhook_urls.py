"""URLs of webhooks: which ones a list of allowed prefixes allows. Pure: no name is resolved.

The list names receivers that the operator trusts. A URL is compared with it after it was parsed, so the host that is
compared is the host that gets the request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

MAX_URL = 2_048
"""Characters that a URL has at most: it travels with the call."""

_PORTS = {"http": 80, "https": 443}
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|[0-9a-f:.]*:[0-9a-f:.]*")
"""A name in lower case, or an IPv6 address without its brackets."""


@dataclass(frozen=True, slots=True)
class WebhookUrl:
    """URL in parts. `target` is what the request asks for: path and query."""

    scheme: str
    host: str
    port: int
    path: str
    target: str

    @property
    def origin(self) -> str:
        """Scheme, host and port: the part of the URL that may be shown, since path and query may hold a token."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port != _PORTS[self.scheme] else "")


def read_webhook_url(text: str) -> WebhookUrl:
    """Returns the parts of a URL. Raises ValueError if it is invalid; the message does not quote the URL."""
    if len(text) > MAX_URL or not _VISIBLE.fullmatch(text) or "\\" in text:
        raise ValueError(f"must be at most {MAX_URL} visible ASCII characters without a backslash")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("must be a URL with a valid host and port") from None
    host = parts.hostname or ""
    if parts.scheme not in _PORTS or not text.lower().startswith(f"{parts.scheme}://") or not _HOST.fullmatch(host):
        raise ValueError("must be a URL as in https://hooks.example.com/path")
    if "@" in parts.netloc or "#" in text:
        raise ValueError("must have no user, password or fragment")
    if port == 0:
        raise ValueError("must be a URL with a valid host and port")
    path = parts.path or "/"
    _check_path(path)
    target = f"{path}?{parts.query}" if parts.query else path
    return WebhookUrl(parts.scheme, host, port or _PORTS[parts.scheme], path, target)


def _check_path(path: str) -> None:
    # A server may decode the path and resolve its steps: then it is another path than the one that was compared.
    decoded = unquote(path)
    if "%" in decoded or "\\" in decoded or decoded.count("/") != path.count("/") or not decoded.isprintable():
        raise ValueError("must not hide slashes, backslashes, percent signs or control characters in its path")
    if {".", ".."} & {step.partition(";")[0] for step in decoded.split("/")} or "//" in decoded:
        raise ValueError("must have no empty step, . or .. in its path")


def read_allowed(text: str) -> str:
    """Returns the prefix unchanged. Raises ValueError if it can be no prefix of URLs."""
    read_webhook_url(text)
    if "?" in text:
        raise ValueError("must have no query: it is the start of the URLs that are allowed")
    return text


def is_allowed(url: WebhookUrl, allowed: Sequence[str]) -> bool:
    """Tells if one of the prefixes has the URL's scheme, host and port, and its path or a path above it."""
    return any(_covers(read_webhook_url(prefix), url) for prefix in allowed)


def _covers(prefix: WebhookUrl, url: WebhookUrl) -> bool:
    same = (prefix.scheme, prefix.host, prefix.port) == (url.scheme, url.host, url.port)
    below = url.path.startswith(prefix.path if prefix.path.endswith("/") else f"{prefix.path}/")
    return same and (url.path == prefix.path or below)
