"""Signs users in by HTTP Basic: remembers right passwords, and refuses to check many wrong ones."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Literal

from millstream.gateway.dashboard.users import NOBODY, User

MOST_WRONG = 10
"""Wrong passwords in WRONG_WITHIN_S from which on no further unknown one is checked."""

WRONG_WITHIN_S = 60.0
"""Seconds for which a wrong password counts."""

MOST_REMEMBERED = 256
"""Right passwords that are remembered, as keyed digests: the latest ones."""

Refusal = Literal["unknown", "too many"]


class SignIn:
    """The users that may sign in. All threads share it."""

    def __init__(self, users: Mapping[str, User]) -> None:
        self._users = users
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, User] = OrderedDict()
        self._wrong: deque[float] = deque(maxlen=MOST_WRONG)
        # One at a time: a check takes 16 MiB, and wrong ones are counted before the next begins.
        self._lock = threading.Lock()

    def remembered(self, header: str) -> User | None:
        """Returns the user whose Authorization header this is, if it was checked before; quick."""
        return self._right.get(self._digest(header))

    def check(self, header: str, now: float) -> User | Refusal:
        """Checks an Authorization header at `now`, monotonic seconds. Takes 50 ms.

        "too many": many passwords were wrong in the last minute, so this one is not checked.
        """
        name, password = _credentials(header)
        if not name:
            return "unknown"
        with self._lock:
            if user := self.remembered(header):
                return user
            while self._wrong and now - self._wrong[0] >= WRONG_WITHIN_S:
                self._wrong.popleft()
            if len(self._wrong) >= MOST_WRONG:
                return "too many"
            user = self._users.get(name, NOBODY)
            if not user.has_password(password) or user is NOBODY:
                self._wrong.append(now)
                return "unknown"
            self._remember(header, user)
            return user

    def _remember(self, header: str, user: User) -> None:
        self._right[self._digest(header)] = user
        if len(self._right) > MOST_REMEMBERED:
            self._right.popitem(last=False)

    def _digest(self, header: str) -> bytes:
        return hmac.digest(self._key, header.encode(errors="surrogatepass"), hashlib.sha256)


def _credentials(header: str) -> tuple[str, str]:
    """Returns name and password of an Authorization header; both "" if it is not of the kind Basic."""
    scheme, _, value = header.partition(" ")
    try:
        name, colon, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
    except ValueError:
        return "", ""
    return (name, password) if scheme.lower() == "basic" and colon else ("", "")
