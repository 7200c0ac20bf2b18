"""The jobs that an id names on the command line: those of a detached call, or a single one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

from millstream.broker.contract.errors import InvalidRequest, ResultExpired
from millstream.broker.queue.job_trace import SEEN_AFTER_SETTLE_MS, find_service
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, translated

if TYPE_CHECKING:
    from millstream.client.detached_id import DetachedId

_JOB = re.compile(r"[0-9a-f]{32}")
_SHAPE = re.compile(r"(\d{1,9}x\d{1,9}) ")


@dataclass(frozen=True, slots=True)
class JobIds:
    """The first jobs that `given` names. `call`: their detached call, "" if they are part of none. `total`: all jobs.

    `service` is "" if no service knows the job.
    """

    given: str
    service: str
    job_ids: Sequence[str]
    call: str
    total: int


def find_jobs(connection: Connection, prefix: str, given: str, limit: int | None = None) -> JobIds:
    """Returns the first `limit` jobs of an id: of a detached call, or 32 hexadecimal digits of a job or a call.

    Raises InvalidRequest if it is no id, BrokerUnavailable.
    """
    detached = find_detached(connection, prefix, given)
    if detached is None:
        return JobIds(given, find_service(connection, prefix, given) or "", [given], "", 1)
    parts = detached.split()
    return JobIds(str(detached), detached.service, list(islice(parts, limit)), detached.call, len(parts))


def find_detached(connection: Connection, prefix: str, given: str) -> DetachedId | None:
    """Returns the detached call that `given` names; None if it is the id of a job that names none.

    Raises InvalidRequest if it is no id, BrokerUnavailable.
    """
    # Imported here: the client takes 80 ms.
    from millstream.client.detached_id import DetachedId

    if _JOB.fullmatch(given):
        named = _find_call(connection, prefix, given)
        return DetachedId.parse(named) if named else None
    try:
        return DetachedId.parse(given)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, hint="such as embed:8x8:9f86d0..., or 32 hexadecimal digits") from None


def _find_call(connection: Connection, prefix: str, call: str) -> str:
    """Returns the id of the detached call whose first job is `call`; "" if no registered service has it."""
    registry = Registry(connection, prefix)
    names = registry.names()
    with translated(connection.safe_url):
        pipe = connection.client.pipeline(transaction=False)
        for name in names:
            pipe.hget(registry.keys(name).call(call), "payload")
        payloads = cast(list[bytes | None], pipe.execute())
    for name, payload in zip(names, payloads, strict=True):
        if match := _SHAPE.match((payload or b"").decode(errors="replace")):
            return f"{name}:{match[1]}:{call}"
    return ""


def unknown(given: str, where: str) -> ResultExpired:
    """Returns the error of an id that the server does not know, or no more."""
    return ResultExpired(
        f"no job {given!r} on {where}",
        hint=f"a job is known until {SEEN_AFTER_SETTLE_MS // 1000} s after its answer, a detached one for "
        "redis.result_ttl",
    )
