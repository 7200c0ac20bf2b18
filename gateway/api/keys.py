"""API keys: a file of records, a line of JSON each, with the hash of the key. `millstream key` changes it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millstream.broker.config.fields import SERVICE_NAME
from millstream.broker.config.spec import PriorityName
from millstream.broker.contract.errors import ConfigError, InvalidRequest
from millstream.broker.contract.job import PRIORITIES
from millstream.gateway.private_file import read_private_file

log = logging.getLogger(__name__)

Role = Literal["caller", "viewer", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

RELOAD_S = 1.0
"""Seconds after which a file of keys is looked at again: a revoked key is refused after at most so long."""

PREFIX = "ms-"
"""Begin of all keys, so that programs which look for secrets find them."""

_HINT = "`millstream key add` writes a line of it"


ServiceName = Annotated[str, Field(pattern=rf"^{SERVICE_NAME}$")]


class Key(BaseModel):
    """An API key. A caller calls services, a viewer reads metrics and backlogs, an admin does both.

    `tenant` is that of all calls. `services` are those that may be called, empty for all. `highest_priority` is the
    most urgent one that calls may have. `max_concurrent` limits the requests at once in each gateway process; None is
    no limit. `sha256` is the hash of the key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    role: Role = "caller"
    tenant: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    services: tuple[ServiceName, ...] = ()
    highest_priority: PriorityName = "realtime"
    max_concurrent: int | None = Field(default=None, ge=1)

    @property
    def may_call(self) -> bool:
        return self.role != "viewer"

    @property
    def may_view(self) -> bool:
        return self.role != "caller"

    def allows(self, service: str) -> bool:
        """Returns whether calls may go to `service`."""
        return not self.services or service in self.services

    def allows_priority(self, priority: PriorityName) -> bool:
        """Returns whether calls may have this priority."""
        return _RANKS[priority] >= _RANKS[self.highest_priority]


_RANKS: Mapping[str, int] = {each.value: rank for rank, each in enumerate(PRIORITIES)}
"""Ranks of priorities; the most urgent one is 0."""

LOCAL = Key(name="local", sha256="0" * 64, role="admin")
"""The key of all requests if no file of keys is used: only this host can connect then."""


def new_key() -> str:
    """Returns a random key of 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """Returns the hash of a key. A key is random, so that no slow hash is needed."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def make_record(values: Mapping[str, object]) -> Key:
    """Returns a checked record. Raises InvalidRequest if a value is not valid."""
    try:
        return Key.model_validate(values)
    except ValidationError as error:
        raise InvalidRequest(f"not a valid key: {_reason(error)}") from None


def read_keys(file: Path) -> Mapping[str, Key]:
    """Returns the keys of `file` by hash. Raises ConfigError if it is malformed, or if others may change it."""
    keys = list(_parse(file, read_private_file(file, "file of keys", _HINT)))
    _check_names(file, keys)
    return {key.sha256: key for key in keys}


def add_key(file: Path, key: Key) -> None:
    """Adds a key to `file`, which is made if it does not exist. Raises InvalidRequest if its name is in use."""
    with _locked(file):
        keys = [*(read_keys(file).values() if file.exists() else ()), key]
        if sum(each.name == key.name for each in keys) > 1:
            raise InvalidRequest(
                f"there is a key {key.name!r} in {file}", hint="choose another name, or revoke it first"
            )
        _write(file, keys)


def revoke_key(file: Path, name: str) -> None:
    """Removes a key from `file`. Raises InvalidRequest if there is none of this name."""
    with _locked(file):
        keys = list(read_keys(file).values())
        remaining = [each for each in keys if each.name != name]
        if len(remaining) == len(keys):
            raise InvalidRequest(f"no key {name!r} in {file}", hint="`millstream key ls` lists them")
        _write(file, remaining)


class KeyRing:
    """The keys of a file, which is read again when it has changed. If it cannot be read, the last keys stay."""

    def __init__(self, file: Path) -> None:
        """Reads the file. Raises ConfigError."""
        self._file = file
        self._looked_at = 0.0
        self._state = _state(file)
        self._keys = read_keys(file)

    def find(self, key: str, now: float) -> Key | None:
        """Returns the record of `key`; None if there is none. `now` is in monotonic seconds."""
        if now - self._looked_at >= RELOAD_S:
            self._looked_at = now
            self._reload()
        return self._keys.get(digest(key))

    def _reload(self) -> None:
        state = _state(self._file)
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = read_keys(self._file)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)


def _state(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


def _parse(file: Path, text: str) -> Iterator[Key]:
    for at, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield Key.model_validate(json.loads(line))
            except ValidationError as error:
                raise ConfigError(f"{file}:{at}: {_reason(error)}", hint=_HINT) from None
            except (ValueError, RecursionError):
                raise ConfigError(f"{file}:{at}: not a line of JSON", hint=_HINT) from None


def _check_names(file: Path, keys: Iterable[Key]) -> None:
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise ConfigError(f"{file}: two keys have one name", hint="remove one of the lines")


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keeps other commands from changing `file`. Raises ConfigError if that is not possible."""
    try:
        with file.with_name(f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be changed: {error.strerror}", hint="check the folder and its owner"
        ) from None


def _write(file: Path, keys: Iterable[Key]) -> None:
    """Replaces `file` as a whole, so that a gateway never reads half of it."""
    fresh = file.with_name(f".{file.name}.new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        stream.writelines(f"{key.model_dump_json(exclude_defaults=True)}\n" for key in keys)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
