"""Refuses a server that deletes keys when its memory is full, because accepted jobs and answers would be lost."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import redis

from millstream.broker.config.variables import ALLOW_EVICTION_VARIABLE
from millstream.broker.contract.errors import ConfigError
from millstream.broker.transport.access import is_true

if TYPE_CHECKING:
    from millstream.broker.config.load import Config

log = logging.getLogger(__name__)

SAFE = "noeviction"
"""The only `maxmemory-policy` under which no job is lost."""

_ALLOWED_BY = f"--allow-eviction, {ALLOW_EVICTION_VARIABLE}=1 or `redis: {{allow_eviction: true}}` uses it as it is"


def allowed(config: Config | None, environ: Mapping[str, str]) -> bool:
    """Returns whether MILLSTREAM_ALLOW_EVICTION or `redis.allow_eviction` allows a server that deletes keys."""
    return is_true(environ.get(ALLOW_EVICTION_VARIABLE, "")) or bool(config and config.redis.allow_eviction)


def check_policy(where: str, node: redis.Redis, memory: Mapping[str, object], *, allow: bool) -> None:
    """Raises ConfigError if `node` deletes keys when its memory is full.

    Only warns if `allow`, or if `node` has no maxmemory: without one the server deletes nothing. `memory` is the node's
    answer to INFO memory, `where` its URL without a password.
    """
    policy = str(memory.get("maxmemory_policy") or _configured(node))
    if policy == SAFE:
        return
    if not policy:
        log.warning("%s does not say its maxmemory-policy: set it to %s, any other one deletes jobs", where, SAFE)
        return
    problem = f"{where} has maxmemory-policy {policy}: when its memory is full it deletes {_victims(policy)}"
    if not memory.get("maxmemory"):
        log.warning("%s; it has no maxmemory now. %s", problem, _fix(node))
    elif allow:
        log.warning("%s; that is allowed here", problem)
    else:
        raise ConfigError(problem, hint=f"{_fix(node)}; {_ALLOWED_BY}")


def _configured(node: redis.Redis) -> str:
    """Returns the policy from CONFIG GET, for a server whose INFO is cut short; empty if the server refuses CONFIG.

    Managed servers often do.
    """
    try:
        answer = cast(Mapping[str, object], node.config_get("maxmemory-policy"))
    except redis.ResponseError:
        return ""
    return str(answer.get("maxmemory-policy", ""))


def _victims(policy: str) -> str:
    return "accepted jobs" if policy.startswith("allkeys") else "answers before they are read, and idempotency keys"


def _fix(node: redis.Redis) -> str:
    settings = node.connection_pool.connection_kwargs
    path = settings.get("path")
    server = ["-s", str(path)] if path else ["-h", str(settings.get("host")), "-p", str(settings.get("port"))]
    command = shlex.join(["redis-cli", *server, "CONFIG", "SET", "maxmemory-policy", SAFE])
    return f"run `{command}`, and put `maxmemory-policy {SAFE}` into its configuration file"
