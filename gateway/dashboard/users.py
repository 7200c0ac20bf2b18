"""The file of the dashboard's users: a line each, NAME ROLE HASH. Passwords are stored as scrypt hashes.

`millstream dashboard --new-user NAME:ROLE` prints such a line.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from millstream.broker.contract.errors import ConfigError, InvalidRequest
from millstream.gateway.private_file import read_private_file

Role = Literal["viewer", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)

SHORTEST = 8
"""Characters that a new password has at least."""

_NAME = re.compile(r"[^\s:]{1,64}")
_HASH = re.compile(r"scrypt:([0-9a-f]{32}):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class User:
    """A user of the dashboard. `salt` and `digest` are of the password."""

    name: str
    role: Role
    salt: bytes
    digest: bytes

    def has_password(self, password: str) -> bool:
        """Returns whether `password` is right, in the same time in either case. Takes 50 ms and 16 MiB."""
        return hmac.compare_digest(_digest(password, self.salt), self.digest)


NOBODY = User("", "viewer", bytes(16), bytes(32))
"""A user without a password: those of unknown names are checked against it, so that both take equally long."""


def new_line(name: str, role: str, password: str) -> str:
    """Returns the line of a new user. Raises InvalidRequest if name, role or password cannot be used."""
    if not _NAME.fullmatch(name) or name.startswith("#"):
        raise InvalidRequest(f"{name!r} is no name of a user", hint="up to 64 characters, no spaces, no colon")
    if role not in ROLES:
        raise InvalidRequest(f"{role!r} is no role", hint=f"one of {', '.join(ROLES)}")
    if len(password) < SHORTEST:
        raise InvalidRequest("the password is too short", hint=f"at least {SHORTEST} characters")
    salt = secrets.token_bytes(16)
    return f"{name} {role} scrypt:{salt.hex()}:{_digest(password, salt).hex()}"


def read_users(file: Path) -> Mapping[str, User]:
    """Returns the users of `file` by name. Raises ConfigError if it is malformed, or if others may change it."""
    text = read_private_file(file, "password file", _HOW)
    users = {user.name: user for user in _users(file, text)}
    if not users:
        raise ConfigError(f"the password file {file} names no user", hint=_HOW)
    return users


_HOW = "`millstream dashboard --new-user NAME:ROLE` prints a line for it"


def _users(file: Path, text: str) -> Iterator[User]:
    for at, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            name, role, secret = (*line.split(), "", "", "")[:3]
            found = _HASH.fullmatch(secret)
            if not _NAME.fullmatch(name) or role not in ROLES or not found or len(line.split()) != 3:
                raise ConfigError(f"{file}:{at}: not a line of the form NAME ROLE HASH", hint=_HOW)
            yield User(name, "operator" if role == "operator" else "viewer", *map(bytes.fromhex, found.groups()))


def _digest(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(errors="surrogatepass"), salt=salt, n=16_384, r=8, p=1, dklen=32)
