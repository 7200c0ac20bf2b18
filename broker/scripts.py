"""Loads the Lua scripts and runs them by digest. The typed methods live in the module that owns each verb."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal, get_args

import redis

Name = Literal["enqueue", "claim", "settle", "beat", "cancel", "release", "reclaim", "purge"]
Argument = str | bytes | int


# Read now, not at the first call: reading imports modules, and a process forked while another thread imports one
# would wait for that import for ever.
_FOLDER = resources.files("millstream.broker").joinpath("lua")
_SOURCES: dict[Name, bytes] = {name: _FOLDER.joinpath(f"{name}.lua").read_bytes() for name in get_args(Name)}
_DIGESTS = {name: hashlib.sha1(source, usedforsecurity=False).hexdigest() for name, source in _SOURCES.items()}


def source(name: Name) -> bytes:
    return _SOURCES[name]


def run(client: redis.Redis, name: Name, keys: Sequence[str], args: Sequence[Argument]) -> Any:
    """The script's reply as redis-py gives it. Content-addressed, so old and new versions can run side by side."""
    try:
        return client.evalsha(_DIGESTS[name], len(keys), *keys, *args)
    except redis.exceptions.NoScriptError:
        # After SCRIPT FLUSH, a restart or a failover the cache is cold.
        client.script_load(source(name).decode())
        return client.evalsha(_DIGESTS[name], len(keys), *keys, *args)
