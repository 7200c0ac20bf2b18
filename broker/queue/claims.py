"""Claims: the limits of one, its result, and how the server's answer to it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from millstream.broker.contract.entry_codec import decode_entry, salvage
from millstream.broker.contract.errors import Malformed, NewerVersion
from millstream.broker.contract.job import Address, Claim
from millstream.broker.contract.operations import STREAMING_OPS


class ClaimBudget(NamedTuple):
    """The limits of one claim, in `jobs`, `rows` and `tokens`.

    `empty_handed`: the worker holds no jobs, so one job may exceed rows and tokens. `saved`: rows that normal and batch
    jobs may take before more urgent ones. New jobs come from the `streams` most urgent streams, returned jobs from the
    `returned` most urgent ones. `held`: jobs that this worker holds, which are part of its share of all waiting jobs;
    beyond its share it claims only until it has `next_rows`, the rows missing in its next batch. `max_attempts` limits
    the size of groups of suspects. `job`: rows and tokens of the job it claimed last, to estimate how many fit.
    `large`: a job that does not fit and has more rows or tokens than these is reported like a suspect, so that the
    worker becomes free for it.
    """

    jobs: int
    rows: int
    tokens: int
    live_workers: int = 1
    empty_handed: bool = False
    streams: int = 3
    returned: int = 3
    saved: tuple[int, int] = (0, 0)
    held: int = 0
    next_rows: int = 0
    max_attempts: int = 3
    job: tuple[int, int] = (1, 1)
    large: tuple[int, int] = (10**9, 10**9)


@dataclass(frozen=True, slots=True)
class Claimed:
    """The result of one claim. `now`: server clock, ms. `waiting`: new and returned jobs that remain, by stream.

    `suspects`: the most urgent stream, 1 to 3, that has suspects or a large job for a worker that holds nothing; 0 if
    none has. `paused`: the service is paused, so the script claimed nothing. The first `woken` claims were delivered to
    a blocking read, even if the service is paused. `blocked`: the stream, 1 to 3, whose next job has more rows or
    tokens than the budget has room for; 0 if none has.
    """

    now: int
    waiting: tuple[int, ...] = (0, 0, 0)
    suspects: int = 0
    paused: bool = False
    blocked: int = 0
    claims: list[Claim] = field(default_factory=list)
    woken: int = 0


def decode_claim(
    stream: int,
    entry: bytes,
    flat: Sequence[bytes],
    attempts: float,
    *,
    by_share: bool = False,
    given_back: bool = False,
) -> Claim:
    """Returns the claim of an entry of stream number `stream`, 1 to 3. A malformed entry gives one without a job."""
    name = f"{stream}:{entry.decode()}"
    try:
        job = decode_entry(flat)
    except Malformed as error:
        newer = isinstance(error, NewerVersion)
        return Claim(Address(name, *salvage(flat)), None, attempts, str(error), by_share, newer, given_back)
    address = Address(name, job.id, job.client, job.call, job.op in STREAMING_OPS, job.rows, job.at)
    return Claim(address, job, attempts, by_share=by_share, given_back=given_back)


def decode_claimed(woken: list[Claim], answer: Any) -> Claimed:
    """Returns the result of the claim script. `woken`: claims that a blocking read delivered before it ran."""
    now, waiting, suspects, paused, blocked, *rows = answer
    claims = [
        decode_claim(stream, entry, fields, (deliveries - 1) / 2, by_share=bool(by_share), given_back=bool(returned))
        for stream, entry, deliveries, fields, by_share, returned in rows
    ]
    return Claimed(now, tuple(waiting), suspects, bool(paused), blocked, woken + claims, len(woken))


def flat_fields(fields: dict[bytes, bytes]) -> list[bytes]:
    """Returns names and values in turn, as the claim script returns an entry."""
    return [part for pair in fields.items() for part in pair]
