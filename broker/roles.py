"""Roles: the commands and keys that each kind of user may use on the server, as Redis ACL rules. Pure.

From Redis 7.0 on a selector grants each command on its own keys. Redis 6.2 has no selectors: there all commands of a
role are granted on all of its keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys, routes_key, services_key

Role = Literal["viewer", "client", "gateway", "worker", "admin"]

SELECTORS_SINCE = (7, 0)
"""Version of Redis and Valkey from which on ACLs have selectors."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Commands, and the keys of a service that they may read, or read and write."""

    commands: str
    read: str = ""
    write: str = ""


_UPSTREAM = "evalsha hget hset hdel hgetall pexpire"
"""Commands of workers on the keys of servers that already run, which belong to no service."""

# Commands to connect to a single server or a cluster, and to read its clock.
_CONNECT = (
    "ping select client|setname client|getname info time wait "
    "command asking readonly cluster|slots cluster|shards cluster|nodes"
)

_JOBS = "q:realtime q:normal q:batch"
_TENANTS = "index:* turn:* past:* parked:* in_flight tenants"
"""Keys of a service with `fair`."""

_LOOK = (
    Grant("hget hmget hgetall exists type ttl pttl memory|usage", read="*"),
    Grant("xlen xrange xrevrange xpending xinfo|groups xinfo|consumers xinfo|stream", read=f"{_JOBS} dead webhooks"),
    Grant("get", read="paused reclaim seen:* partial:* webhook:*"),
    Grant("hlen", read="call:*"),
    Grant("zrange zcount zscore", read="workers standby cancelled"),
    Grant("zcard zrange", read=_TENANTS),
)

# No script|load: a user who may load scripts may load one that never ends. Workers load all scripts, see scripts.py.
# No xack: it could settle jobs that workers hold. `cancel` works without it.
_CALL = (
    Grant(
        "evalsha",
        write=f"service {_JOBS} bucket bucket:* paused refused seen:* cancelled trail reply:* result:* call:* "
        f"partial:* metrics webhooks bell {_TENANTS}",
    ),
    Grant("zscore zmscore zlexcount zadd zrem zunionstore hget hdel exists del pexpire", write=_TENANTS),
    Grant("xadd", write="bell"),
    Grant("xadd pexpire", write="webhooks"),
    Grant("hget hmget", read="service canary bucket bucket:* call:*"),
    Grant("hset hincrby hexists hstrlen hlen pttl pexpire", write="call:*"),
    Grant("get pttl exists", read="paused seen:* result:*"),
    Grant("mget", read="cache:*"),
    Grant("zcount", read="workers"),
    Grant("xlen xrange xpending", read=_JOBS),
    Grant("xadd xdel", write=_JOBS),
    Grant("hset pexpire", write="bucket bucket:*"),
    Grant("hincrby pexpire", write="refused metrics"),
    Grant("hgetall", read="metrics"),
    Grant("zadd zremrangebyscore pexpire", write="cancelled"),
    Grant("set pexpire", write="seen:* result:*"),
    Grant("get set", write="pinned:*"),
    Grant("xadd xread xdel pexpire", write="reply:*"),
    Grant("get mget getrange", read="partial:*"),
    Grant("del", write="partial:*"),
)

_WORK = (
    Grant("script|load"),
    Grant(
        "evalsha",
        write=f"service {_JOBS} paused dead trail cancelled reply:* seen:* result:* call:* partial:* metrics webhooks "
        f"bell {_TENANTS}",
    ),
    Grant("xadd pexpire xlen xreadgroup xclaim xpending xack xdel xgroup|create", write="webhooks"),
    Grant("set", write="webhook:*"),
    Grant("hset hincrby hmget hstrlen hlen pexpire", write="call:*"),
    Grant(
        "evalsha",
        write=f"service {_JOBS} paused workers standby worker:* cancelled reclaim trail bell metrics {_TENANTS}",
    ),
    Grant("zscore zmscore zlexcount zrangebylex zrangebyscore zremrangebyscore", write=_TENANTS),
    Grant("zadd zrem zunionstore hget hset hdel pexpire del", write=_TENANTS),
    Grant("hsetnx", write="service"),
    Grant("evalsha hset hmget", write="canary"),
    Grant("xreadgroup xack xclaim xdel xgroup|create xgroup|setid xgroup|delconsumer", write=f"{_JOBS} bell"),
    Grant("zadd zrem pexpire", write="workers standby cancelled"),
    Grant("hset hdel hincrby del pexpire", write="worker:* trail supervisors"),
    Grant("hincrby pexpire", write="metrics"),
    Grant("get set del pexpire", write="reclaim"),
    Grant("pexpire", write="drained"),
    Grant("xadd", write="dead bell"),
    Grant("xadd xlen pexpire", write="reply:*"),
    Grant("get pttl", read="seen:*"),
    Grant("mget strlen getrange", read="partial:*"),
    Grant("append del pexpire", write="partial:*"),
    Grant("set pexpire", write="seen:* result:*"),
    Grant("set", write="cache:*"),
)

_OPERATE = (
    Grant("script|load watch unwatch multi exec discard"),
    Grant("evalsha hset hsetnx hdel hincrby set del pexpire get exists watch", write="*"),
    Grant("xadd xack xdel xtrim xclaim xgroup|create xgroup|delconsumer", write="*"),
    Grant("zadd zrem zremrangebyscore", write="*"),
)

_GRANTS: dict[Role, tuple[Grant, ...]] = {
    "viewer": _LOOK,
    "client": _CALL,
    "gateway": (*_LOOK, *_CALL),
    "worker": (*_LOOK, *_WORK),
    "admin": (*_LOOK, *_CALL, *_WORK, *_OPERATE),
}

_SERVICES: dict[Role, str] = dict.fromkeys(_GRANTS, "smembers") | {"admin": "smembers sadd srem"}
"""Commands of each role on the sets of names of services and routes."""

ROLES: tuple[Role, ...] = tuple(_GRANTS)
"""All roles, the one with the fewest rights first."""

_SCRIPTS: dict[str, Role] = {
    "enqueue": "client",
    "cancel": "client",
    "claim": "worker",
    "settle": "worker",
    "emit": "worker",
    "beat": "worker",
    "release": "worker",
    "reclaim": "worker",
    "slots": "worker",
    "canary": "worker",
    "look": "worker",
    "purge": "admin",
    "enqueue_fair": "client",
    "cancel_fair": "client",
    "claim_fair": "worker",
    "settle_fair": "worker",
    "purge_fair": "admin",
}


def rules(
    role: Role, version: tuple[int, ...], services: Sequence[str] = (), prefix: str = DEFAULT_PREFIX
) -> list[str]:
    """Returns the arguments of ACL SETUSER after the user's name that give the user the rights of `role` and no others.

    `version` is the server's. `services` are those that the user may use, by default all. The user's passwords do not
    change.
    """
    words = ["on", "resetkeys", "resetchannels", "-@all"]
    grants = list(_on_keys(role, services or ["*"], prefix))
    if version[:2] < SELECTORS_SINCE:
        keys = [key.removeprefix("%R") for _, keys in grants for key in keys]
        commands = [command for commands, _ in grants for command in commands]
        return [*words, *dict.fromkeys([*_plus(_CONNECT), *commands]), *dict.fromkeys(keys)]
    keyless = [command for commands, keys in grants if not keys for command in commands]
    selectors = [f"({' '.join([*commands, *keys])})" for commands, keys in grants if keys]
    return [*words, "clearselectors", *_plus(_CONNECT), *keyless, *selectors]


def advice(refusal: str) -> str:
    """Returns a hint for a refused command: the role that may use it.

    `refusal` is the server's message; scripts.py adds the name of a script to it as `(script NAME)`.
    """
    script = re.search(r"script (\w+)\)", refusal)
    command = re.search(r"'([a-z|]+)' command", refusal)
    role = _SCRIPTS.get(script[1]) if script else _least(command[1]) if command else None
    if role is None:
        return "check the user and password in the URL, and the user's ACL: `millstream acl` prints what a role needs"
    return f"use a user of the role {role}: `millstream acl --role {role}` prints its ACL"


def _least(command: str) -> Role | None:
    """Returns the role with the fewest rights that may use `command`."""
    names = {command, command.partition("|")[0]}
    for role in ROLES:
        granted = {word for grant in _GRANTS[role] for word in grant.commands.split()}
        if names & (granted | {word.partition("|")[0] for word in granted}):
            return role
    return "admin" if command in ("sadd", "srem") else None


def _on_keys(role: Role, services: Sequence[str], prefix: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yields the commands and the key patterns of each grant of `role`."""
    access = "%R~" if role != "admin" else "~"
    yield _plus(_SERVICES[role]), [f"{access}{services_key(prefix)}", f"{access}{routes_key(prefix)}"]
    if role in ("worker", "admin"):
        yield _plus(_UPSTREAM), [f"~{prefix}:upstream:*"]
    for grant in _GRANTS[role]:
        keys = [f"%R~{key}" for key in _patterns(grant.read, services, prefix)]
        yield _plus(grant.commands), keys + [f"~{key}" for key in _patterns(grant.write, services, prefix)]


def _patterns(names: str, services: Sequence[str], prefix: str) -> list[str]:
    # Prefixes and names of services contain no characters that are special in a pattern.
    starts = [ServiceKeys(service, prefix).spec().removesuffix("service") for service in services]
    return [f"{start}{name}" for start in starts for name in names.split()]


def _plus(commands: str) -> list[str]:
    return [f"+{command}" for command in commands.split()]
