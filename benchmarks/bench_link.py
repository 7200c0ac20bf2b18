"""A script call over one connection: through redis-py, through its single-connection client, and through ours.

The call is the one that submits jobs. All its jobs are known to the server already, so that nothing grows. Each way
runs in this thread, in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from unittest.mock import patch

import redis
from measure import Effort, Grid, Report, Rounds, Table
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry
from stage import Stage, echo

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue import scripts
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.link import FastPacker, SingleConnectionPool, Words, exchange, exchange_over

SERVICE = echo("bench")
SIZES = (1, 64)
"""Jobs of one call."""

LIBRARY, OURS = "redis-py, pipeline", "ours: pool, exchange, packer"
SETTINGS: Mapping[str, object] = {"protocol": 2, "socket_timeout": 5.0, "retry": Retry(NoBackoff(), 0)}

Call = Callable[[Words], object]
"""Sends one command and returns its answer."""


def ways(url: str) -> Mapping[str, Call]:
    """Returns each way to send a command, over a connection of its own."""

    def pool(kind: type[ConnectionPool], **settings: object) -> ConnectionPool:
        made: ConnectionPool = kind.from_url(url, **SETTINGS, **settings)
        return made

    def pipeline(kind: type[ConnectionPool], **settings: object) -> Call:
        client = redis.Redis.from_pool(pool(kind, **settings))

        def call(words: Words) -> object:
            pipe = client.pipeline(transaction=False)
            pipe.execute_command(*words)  # type: ignore[no-untyped-call]
            return pipe.execute(raise_on_error=False)

        return call

    def command(**settings: object) -> Call:
        client = redis.Redis.from_url(url, **SETTINGS, **settings)
        return lambda words: client.execute_command(*words)  # type: ignore[no-untyped-call]

    def sent(kind: type[ConnectionPool], **settings: object) -> Call:
        own = pool(kind, **settings)
        return lambda words: exchange_over(own, [words])

    def on_its_connection() -> Call:
        client = redis.Redis.from_url(url, **SETTINGS, single_connection_client=True, command_packer=fast)
        kept = SimpleNamespace(get_connection=lambda: client.connection, release=lambda connection: None)
        return lambda words: exchange_over(kept, [words])  # type: ignore[arg-type]

    fast = FastPacker()
    ours = redis.Redis.from_pool(pool(SingleConnectionPool, command_packer=fast))
    return {
        LIBRARY: pipeline(ConnectionPool),
        "redis-py, command": command(),
        "redis-py, single_connection_client": command(single_connection_client=True),
        "its connection, our exchange and packer": on_its_connection(),
        "only our pool": pipeline(SingleConnectionPool),
        "only our exchange": sent(ConnectionPool),
        "only our packer": pipeline(ConnectionPool, command_packer=fast),
        "ours without the pool": sent(ConnectionPool, command_packer=fast),
        "ours without the exchange": pipeline(SingleConnectionPool, command_packer=fast),
        "ours without the packer": sent(SingleConnectionPool),
        OURS: lambda words: exchange(ours, words),
    }


def measure(stage: Stage, effort: Effort) -> Report:
    stage.register(SERVICE)
    calls = {jobs: submission(stage, jobs) for jobs in SIZES}
    rounds = Rounds()
    found = ways(stage.url)
    seconds = effort.seconds / 4
    for turn in range(effort.repeats):
        for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
            for jobs, words in calls.items():
                once(rounds, f"{name} {jobs}", found[name], words, seconds)
    return report(rounds, list(found), seconds)


def submission(stage: Stage, jobs: int) -> Words:
    """Returns the command that submits `jobs` small jobs, after it was sent once."""
    sent: list[Words] = []

    def note(client: redis.Redis, *commands: Words) -> list[object]:
        sent.extend(commands)
        return exchange(client, *commands)

    drafts = [
        Draft(os.urandom(16).hex(), "embed", 1, 4, encode_inputs(["a mill on a stream"], {}), "bench")
        for _ in range(jobs)
    ]
    with patch.object(scripts, "exchange", note):
        Streams(stage.connection.client, stage.keys(SERVICE)).enqueue([Group(Priority.NORMAL, drafts)])
    return sent[0]


def once(rounds: Rounds, name: str, call: Call, words: Words, seconds: float) -> None:
    """Calls for `seconds`, and notes the calls a second and this thread's CPU of a call in microseconds."""
    call(words)
    calls, cpu, began = 0, time.thread_time(), time.perf_counter()
    while (lasted := time.perf_counter() - began) < seconds:
        call(words)
        calls += 1
    rounds.add(f"{name} rate", calls / lasted)
    rounds.add(f"{name} cpu", 1e6 * (time.thread_time() - cpu) / calls)


def report(rounds: Rounds, names: Sequence[str], seconds: float) -> Report:
    tables = [
        Table(
            f"A call with {jobs} {'job' if jobs == 1 else 'jobs'}",
            ["way", "calls/s", "CPU of a call, µs", "CPU / redis-py's"],
            _rows(rounds, names, str(jobs)),
            f"Medians of runs of {seconds:g} s.",
        )
        for jobs in SIZES
    ]
    return Report(tables)


def _rows(rounds: Rounds, names: Sequence[str], kind: str) -> Grid:
    reference = rounds[f"{LIBRARY} {kind} cpu"]
    return [
        [name, *rounds.of(f"{name} {kind}", ["rate", "cpu"]), rounds[f"{name} {kind} cpu"].over(reference)]
        for name in names
    ]
