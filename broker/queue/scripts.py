"""Loads the Lua scripts and runs them by digest. Typed methods are in the modules that use each script."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Literal, TypeVar, get_args

import redis

from millstream.broker.transport.cluster import load
from millstream.broker.transport.link import exchange

Name = Literal[
    "enqueue",
    "claim",
    "settle",
    "beat",
    "cancel",
    "release",
    "reclaim",
    "purge",
    "emit",
    "slots",
    "canary",
    "look",
    "enqueue_fair",
    "claim_fair",
    "cancel_fair",
    "purge_fair",
    "settle_fair",
]
NAMES: tuple[Name, ...] = get_args(Name)
"""The scripts, one for each verb, and for some a second one for services with `fair`."""

Argument = str | bytes | int
T = TypeVar("T")


# Read at import, not at the first call: reading imports modules, and a process that is forked while another thread
# imports one would wait for that import for ever.
_FOLDER = resources.files("millstream.broker.queue").joinpath("lua")


_FAIR_PARTS = {
    "enqueue": "fair_enqueue",
    "claim": "fair_claim",
    "settle": "fair_settle",
    "cancel": "fair_delete",
    "purge": "fair_delete",
}
"""File that a script of a service with `fair` has besides `fair` and its own."""

_INSERTED_AT = b"-- fair parts\n"
"""The line of a script that is replaced by these two files."""


def _read(name: str) -> bytes:
    return _FOLDER.joinpath(f"{name}.lua").read_bytes()


def _source(name: Name) -> bytes:
    verb = name.removesuffix("_fair")
    if verb == name:
        return _read(name)
    # Scripts of their own: services without `fair` pay nothing.
    return _read(verb).replace(_INSERTED_AT, _read("fair") + _read(_FAIR_PARTS[verb]))


_SOURCES: dict[Name, bytes] = {name: _source(name) for name in NAMES}
_DIGESTS = {name: hashlib.sha1(source, usedforsecurity=False).hexdigest() for name, source in _SOURCES.items()}


def source(name: Name) -> bytes:
    return _SOURCES[name]


def run(client: redis.Redis, name: Name, keys: Sequence[str], args: Sequence[Argument]) -> Any:
    """Runs a script and returns its reply as redis-py gives it.

    Scripts are addressed by digest, so old and new versions can run side by side. Raises NoScriptError if the script is
    not loaded and the user may not load it, NoPermissionError, which names the script, if the user may not run it.
    """
    (reply,) = exchange(client, ("EVALSHA", _DIGESTS[name], len(keys), *keys, *args))
    if isinstance(reply, redis.exceptions.ResponseError):
        return _load_and_retry(client, name, reply, lambda: client.evalsha(_DIGESTS[name], len(keys), *keys, *args))
    if isinstance(reply, Exception):
        raise reply
    return reply


def run_after(
    client: redis.Redis, command: Sequence[Argument], name: Name, keys: Sequence[str], args: Sequence[Argument]
) -> tuple[Any, Any]:
    """Runs `command`, which may block, then a script, in one round trip. Returns the reply to `command`, or its error,
    and the script's reply. Raises as `run` does.
    """
    first, reply = exchange(client, command, ("EVALSHA", _DIGESTS[name], len(keys), *keys, *args))
    if isinstance(reply, redis.exceptions.NoScriptError):
        return first, run(client, name, keys, args)
    if isinstance(reply, redis.exceptions.ResponseError):
        raise _name_script(reply, name)
    if isinstance(reply, Exception):
        raise reply
    return first, reply


def run_copied(
    client: redis.Redis, name: Name, keys: Sequence[str], args: Sequence[Argument], within_ms: int
) -> tuple[Any, int]:
    """Runs a script. Returns its reply, and how many replicas confirmed within `within_ms` that they have its writes.

    WAIT counts for the last write of the connection: if the script writes nothing, for an earlier one. Raises as `run`
    does.
    """
    return _ensure_loaded(
        client, name, lambda: _run_and_wait(client, _DIGESTS[name], [len(keys), *keys, *args], within_ms)
    )


def _run_and_wait(client: redis.Redis, digest: str, words: Sequence[Argument], within_ms: int) -> tuple[Any, int]:
    # On one connection: WAIT covers only the writes of its own connection.
    answers = exchange(client, ("EVALSHA", digest, *words), ("WAIT", 1, within_ms))
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    reply, replicas = answers
    return reply, int(replicas)


def _ensure_loaded(client: redis.Redis, name: Name, call: Callable[[], T]) -> T:
    """Returns what `call` returns, and loads the script if it is missing. Raises as `run` does."""
    try:
        return call()
    except redis.exceptions.ResponseError as error:
        return _load_and_retry(client, name, error, call)


def _load_and_retry(client: redis.Redis, name: Name, error: redis.exceptions.ResponseError, call: Callable[[], T]) -> T:
    """Loads the scripts and returns what `call` returns, if `error` is NoScriptError; raises any other `error`."""
    if not isinstance(error, redis.exceptions.NoScriptError):
        raise _name_script(error, name) from None
    # After SCRIPT FLUSH, a restart or a failover the server's script cache is empty.
    _load_all(client, error)
    return call()


def _name_script(error: redis.exceptions.ResponseError, name: Name) -> redis.exceptions.ResponseError:
    """Returns the error, with the script's name added if the user lacks a permission."""
    if isinstance(error, redis.exceptions.NoPermissionError) or any(words in str(error) for words in _REFUSED):
        return redis.exceptions.NoPermissionError(f"{error} (script {name})")
    return error


_REFUSED = ("ACL failure in script", "The user executing the script can't")
"""Texts in a script's error if its user lacks a permission: of Valkey, of Redis."""


def _load_all(client: redis.Redis, missing: redis.exceptions.NoScriptError) -> None:
    """Loads all scripts, because clients may not load them and wait for a worker to do it.

    Raises `missing` if this user may not load scripts.
    """
    try:
        for each in _SOURCES.values():
            load(client, each)
    except redis.exceptions.NoPermissionError:
        raise missing from None
