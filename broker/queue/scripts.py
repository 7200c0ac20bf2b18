"""Loads the Lua scripts and runs them by digest. The typed methods live in the module that owns each verb."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Literal, TypeVar, get_args

import redis

from millstream.broker.transport.cluster import load
from millstream.broker.transport.exchange import exchange

Name = Literal["enqueue", "claim", "settle", "beat", "cancel", "release", "reclaim", "purge", "emit"]
Argument = str | bytes | int
T = TypeVar("T")


# Read now, not at the first call: reading imports modules, and a process forked while another thread imports one
# would wait for that import for ever.
_FOLDER = resources.files("millstream.broker.queue").joinpath("lua")
_SOURCES: dict[Name, bytes] = {name: _FOLDER.joinpath(f"{name}.lua").read_bytes() for name in get_args(Name)}
_DIGESTS = {name: hashlib.sha1(source, usedforsecurity=False).hexdigest() for name, source in _SOURCES.items()}


def source(name: Name) -> bytes:
    return _SOURCES[name]


def run(client: redis.Redis, name: Name, keys: Sequence[str], args: Sequence[Argument]) -> Any:
    """The script's reply as redis-py gives it. Content-addressed, so old and new versions can run side by side."""
    (reply,) = exchange(client, ("EVALSHA", _DIGESTS[name], len(keys), *keys, *args))
    if isinstance(reply, redis.exceptions.ResponseError):
        return _again(client, name, reply, lambda: client.evalsha(_DIGESTS[name], len(keys), *keys, *args))
    if isinstance(reply, Exception):
        raise reply
    return reply


def run_after(
    client: redis.Redis, command: Sequence[Argument], name: Name, keys: Sequence[str], args: Sequence[Argument]
) -> tuple[Any, Any]:
    """What `command` answers, or its error, and the script's reply: one round trip, however long `command` blocks."""
    first, reply = exchange(client, command, ("EVALSHA", _DIGESTS[name], len(keys), *keys, *args))
    if isinstance(reply, redis.exceptions.NoScriptError):
        return first, run(client, name, keys, args)
    if isinstance(reply, redis.exceptions.ResponseError):
        raise _told(reply, name)
    if isinstance(reply, Exception):
        raise reply
    return first, reply


def run_copied(
    client: redis.Redis, name: Name, keys: Sequence[str], args: Sequence[Argument], within_ms: int
) -> tuple[Any, int]:
    """The script's reply, and how many replicas said within `within_ms` that they have what it wrote.

    Those of the connection's last write: a script that writes nothing is told of what was written before it.
    """
    return _cached(client, name, lambda: _run_and_wait(client, _DIGESTS[name], [len(keys), *keys, *args], within_ms))


def _run_and_wait(client: redis.Redis, digest: str, words: Sequence[Argument], within_ms: int) -> tuple[Any, int]:
    # One connection: WAIT speaks of the writes of its own.
    answers = exchange(client, ("EVALSHA", digest, *words), ("WAIT", 1, within_ms))
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    reply, replicas = answers
    return reply, int(replicas)


def _cached(client: redis.Redis, name: Name, call: Callable[[], T]) -> T:
    """What `call` returns. Raises NoScriptError where the script is not loaded and this user may not load it, and
    NoPermissionError, which names the script, where it may not run it or what it calls.
    """
    try:
        return call()
    except redis.exceptions.ResponseError as error:
        return _again(client, name, error, call)


def _again(client: redis.Redis, name: Name, error: redis.exceptions.ResponseError, call: Callable[[], T]) -> T:
    """What `call` returns once the script is loaded, if that is all that `error` says is missing."""
    if not isinstance(error, redis.exceptions.NoScriptError):
        raise _told(error, name) from None
    # After SCRIPT FLUSH, a restart or a failover the cache is cold.
    _load_all(client, error)
    return call()


def _told(error: redis.exceptions.ResponseError, name: Name) -> redis.exceptions.ResponseError:
    """The error, with the script's name where it is a right that is missing."""
    if isinstance(error, redis.exceptions.NoPermissionError) or any(words in str(error) for words in _REFUSED):
        return redis.exceptions.NoPermissionError(f"{error} (script {name})")
    return error


_REFUSED = ("ACL failure in script", "The user executing the script can't")
"""What a script's error says where its user lacks a right: Valkey, Redis."""


def _load_all(client: redis.Redis, missing: redis.exceptions.NoScriptError) -> None:
    """Load every script: callers may have no right to, and wait for a worker that has."""
    try:
        for each in _SOURCES.values():
            load(client, each)
    except redis.exceptions.NoPermissionError:
        raise missing from None
