"""Encodes and decodes the entries of a job stream. Pure. The decoder validates its input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from millstream.broker.contract.errors import Malformed, NewerVersion
from millstream.broker.contract.job import Job

VERSION = "1"
FIELDS = ("v", "id", "at", "op", "rows", "tokens", "deadline", "queue_by", "client", "tenant", "trace", "call", "body")
"""Field names of a stream entry, always in this order. They are plain words, so the output of XRANGE is readable.
See docs/protocol.md."""

OPTIONAL = frozenset({"deadline", "queue_by", "client", "tenant", "trace", "call"})
"""Fields that an entry omits if they are empty: each field costs the server and the worker time."""

MAX_UNKNOWN = 16
"""Most fields of newer clients that an entry may have besides FIELDS. They are ignored."""

MAX_UNKNOWN_BYTES = 4096
"""Most bytes of the names and values of these fields together."""

MAX_ROWS = 4096
MAX_TOKENS = 100_000_000
MAX_BODY = 8 * 1024 * 1024
MAX_MS = 2**53

_MOST_WORDS = 2 * len(FIELDS)
_NUMBER = rb"[0-9]{1,16}"
_NAME = rb"[A-Za-z0-9_.-]{0,64}"
_PATTERNS = {
    name: re.compile(pattern)
    for name, pattern in {
        "v": VERSION.encode(),
        "id": rb"[0-9a-f]{32}",
        "at": _NUMBER,
        "op": _NAME,
        "rows": _NUMBER,
        "tokens": _NUMBER,
        "deadline": _NUMBER,
        "queue_by": _NUMBER,
        "client": _NAME,
        "tenant": _NAME,
        "trace": rb"[\x20-\x7e]{0,128}",
        "call": rb"(?:[0-9a-f]{32})?",
    }.items()
}
"""Pattern of the value of each field but the body."""
_NAMES = frozenset(name.encode() for name in FIELDS)
_NEW_NAME = re.compile(rb"[a-z][a-z0-9_]{0,31}")
"""Pattern of the name of a field that newer clients may add."""
_NEWER = re.compile(rb"[1-9][0-9]{0,8}")

_WORDS = re.compile(
    "".join(
        rf"(?:{name}\0({pattern.pattern.decode()})\0){'?' if name in OPTIONAL else ''}"
        for name, pattern in _PATTERNS.items()
    )
    + "body"
)
"""Matches all names and values before the body, separated by NUL, which no pattern of a value matches."""


def encode_entry(job: Job) -> list[str | bytes | int]:
    """Returns the names and values of the fields of `job` in turn, as XADD takes them and the enqueue script writes."""
    flat: list[str | bytes | int] = []
    values = VERSION, job.id, job.at, job.op, job.rows, job.tokens, job.deadline, job.queue_by
    named: Iterable[tuple[str, str | bytes | int]]
    named = zip(FIELDS, (*values, job.client, job.tenant, job.trace, job.call, job.body), strict=True)
    for name, value in named:
        if value or name not in OPTIONAL:
            flat += (name, value)
    return flat


def decode_entry(flat: Sequence[bytes]) -> Job:
    """Returns the job of an entry, given its names and values in turn. Ignores fields of newer clients.

    Raises Malformed, or its subclass NewerVersion if a newer client wrote the entry.
    """
    # One match for all fields: this runs for every job.
    found = _WORDS.fullmatch(b"\0".join(flat[:-1]).decode("latin-1")) if len(flat) <= _MOST_WORDS else None
    if not found or found[0].count("\0") != len(flat) - 2 or len(flat[-1]) > MAX_BODY:
        return _decode_unusual(flat)
    _, job_id, at, op, rows, tokens, deadline, queue_by, client, tenant, trace, call = found.groups("")
    times = int(at), int(deadline or 0), int(queue_by or 0)
    job = Job(job_id, times[0], op, int(rows), int(tokens), *times[1:], client, tenant, trace, flat[-1], call)
    if job.rows > MAX_ROWS or job.tokens > MAX_TOKENS or max(times) > MAX_MS:
        raise Malformed(f"a number is over its limit: rows {MAX_ROWS}, tokens {MAX_TOKENS}, times {MAX_MS} ms")
    return job


def _decode_unusual(flat: Sequence[bytes]) -> Job:
    """Returns the job of an entry with unknown fields. Raises NewerVersion, or Malformed for all other entries."""
    if flat[:1] == [b"v"] and len(flat) > 1 and _NEWER.fullmatch(flat[1]) and int(flat[1]) > int(VERSION):
        raise NewerVersion(f"the entry has version {flat[1].decode()}, this program reads up to {VERSION}")
    unknown = [at for at in range(0, len(flat), 2) if flat[at] not in _NAMES]
    if not unknown or len(flat) % 2:
        raise Malformed(_wrong(flat))
    size = sum([len(flat[at]) + len(flat[at + 1]) for at in unknown])
    if len(unknown) > MAX_UNKNOWN or size > MAX_UNKNOWN_BYTES:
        raise Malformed(
            f"{len(unknown)} unknown fields of {size} bytes are over the limit: {MAX_UNKNOWN} fields, "
            f"{MAX_UNKNOWN_BYTES} bytes"
        )
    if not all(_NEW_NAME.fullmatch(flat[at]) for at in unknown):
        raise Malformed(f"an unknown field's name does not match {_NEW_NAME.pattern.decode()}")
    dropped = set(unknown)
    return decode_entry([part for at, part in enumerate(flat) if at - at % 2 not in dropped])


def _wrong(flat: Sequence[bytes]) -> str:
    """Returns the message that names the first malformed field."""
    names = flat[0::2]
    expected = [name.encode() for name in FIELDS if name not in OPTIONAL or name.encode() in names[: len(FIELDS)]]
    if len(flat) % 2 or names != expected:
        return f"fields are not {' '.join(f'[{name}]' if name in OPTIONAL else name for name in FIELDS)}"
    for name, value in zip(names, flat[1::2], strict=True):
        pattern = _PATTERNS.get(name.decode())
        if pattern and not pattern.fullmatch(value):
            return f"{name.decode()} does not match {pattern.pattern.decode()}"
    return f"body of {len(flat[-1])} bytes is over {MAX_BODY}"


def salvage(flat: Sequence[bytes]) -> tuple[str, str, str]:
    """Returns job id, client and detached call of a malformed entry, to answer it; all "" if one is malformed."""
    fields = dict(zip(flat[0:64:2], flat[1:64:2], strict=False))
    named = [(name, fields.get(name.encode(), b"")) for name in ("id", "client", "call")]
    if not all(_PATTERNS[name].fullmatch(value) for name, value in named):
        return "", "", ""
    job_id, client, call = (value.decode() for _, value in named)
    return job_id, client, call
