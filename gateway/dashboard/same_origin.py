"""Tells whether a request that changes something comes from the dashboard's own page. Pure but for the key.

Three checks: the cookie is SameSite=Strict, the form has a token that belongs to the cookie, and what the browser says
of the request's origin must not contradict.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

COOKIE = "millstream_dashboard"

_SESSION = re.compile("[0-9a-f]{32}")


class Tokens:
    """Tokens of forms, each of which belongs to one browser's cookie. They end with this process."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def token(self, session: str) -> str:
        return hmac.digest(self._key, session.encode(), hashlib.sha256).hex()

    def is_valid(self, session: str, token: str) -> bool:
        """Returns whether `token` is that of the session, which is a cookie's value."""
        return is_session(session) and hmac.compare_digest(token.encode(), self.token(session).encode())


def new_session() -> str:
    return secrets.token_hex(16)


def is_session(value: str) -> bool:
    """Returns whether `value` has the form of a session."""
    return bool(_SESSION.fullmatch(value))
