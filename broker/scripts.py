"""Loads the Lua scripts and runs them by digest. The typed methods live in the module that owns each verb."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal

import redis

Name = Literal["enqueue", "claim", "settle", "beat", "cancel", "release", "reclaim", "purge"]
Argument = str | bytes | int


@cache
def source(name: Name) -> bytes:
    return resources.files("millstream.broker").joinpath("lua", f"{name}.lua").read_bytes()


@cache
def _digest(name: Name) -> str:
    return hashlib.sha1(source(name), usedforsecurity=False).hexdigest()


def run(client: redis.Redis, name: Name, keys: Sequence[str], args: Sequence[Argument]) -> Any:
    """The script's reply as redis-py gives it. Content-addressed, so old and new versions can run side by side."""
    try:
        return client.evalsha(_digest(name), len(keys), *keys, *args)
    except redis.exceptions.NoScriptError:
        # After SCRIPT FLUSH, a restart or a failover the cache is cold.
        client.script_load(source(name).decode())
        return client.evalsha(_digest(name), len(keys), *keys, *args)
