"""Streams of one client, some of which are never read, while workers are killed: what the client gets, and its memory.

An engine says 200 texts of 4,000 words at once, a word a step. The client reads 180 of them. A delta is often a single
word, so there are more than the client can read: it then reads the text so far, or gets the rest with the reply. Two
workers run, and whenever both are ready one gets SIGKILL. The client's short calls meanwhile are all answered.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

from measure import Cell, Report, Table, percentile
from stage import Stage, Team, echo

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from scenario_lib.calls import at_least, at_most

STREAMS, UNREAD, WORDS = 200, 20, 4_000
SERVICE = ServiceSpec(
    name="unread",
    model=ModelSpec(type="echo-stream", model_name="sleep:0.015"),
    model_ref="words",
    # One worker may hold all streams, and short calls beside them.
    runtime=Runtime.of(
        "echo-stream", batch_size=STREAMS + 8, max_batch_tokens=4_000_000, total_timeout=300.0, worker_count=2
    ),
)
OTHER = echo("other")
MOST_BYTES = 60e6
"""Memory that the client may take above its start."""

COMPLETE = "finish reason stop"
KILL_EVERY_S, LOOK_S = 3.0, 0.1
"""Seconds between two kills, at least, and between two looks."""

LEAST_KILLS = 5
REST_S = 240.0
"""Seconds that the client may take in all, beside the scenario's own."""


def run(stage: Stage, seconds: float) -> Report:
    team = stage.workers(SERVICE, 2)
    stage.workers(OTHER, 1)
    numbers = map(str, (STREAMS, UNREAD, WORDS))
    program = stage.python("scenario_lib/unread_client.py", stage.url, SERVICE.name, OTHER.name, *numbers)
    kills = kill_until_it_ends(stage, team, program, seconds + REST_S)
    out, _ = program.communicate()
    found = json.loads(out)
    rows: list[list[Cell]] = [[f"read: {how}", count] for how, count in sorted(found["read"].items())]
    rows += [[f"read late: {how}", count] for how, count in sorted(found["unread"].items())]
    rows += [
        [f"short calls, {kind}: {how}", count] for kind, ended in found["short"].items() for how, count in ended.items()
    ]
    rows += [
        ["longest short call, s", found["longest"]],
        ["workers killed", kills],
        ["pieces of a stream, least", min(found["pieces"])],
        ["pieces of a stream, p50", percentile(found["pieces"], 0.5)],
        ["seconds", found["seconds"]],
        ["words a second", STREAMS * WORDS / found["seconds"]],
        ["memory above the start, MB", found["bytes"] / 1e6],
    ]
    short = [(how, count) for ended in found["short"].values() for how, count in ended.items()]
    targets = [
        at_least("streams that were read and are complete", found["read"].get(COMPLETE, 0), STREAMS - UNREAD),
        at_least("streams that were read late and are complete", found["unread"].get(COMPLETE, 0), UNREAD),
        at_most("short calls without the right answer", sum(count for how, count in short if how != "answered"), 0),
        at_least("short calls of each kind", min(sum(ended.values()) for ended in found["short"].values()), 20),
        at_least("workers killed", kills, LEAST_KILLS),
        at_most("memory above the start, MB", found["bytes"] / 1e6, MOST_BYTES / 1e6),
    ]
    heading = f"{STREAMS} streams of {WORDS:,} words, {UNREAD} of them unread, under kills"
    return Report([Table(heading, ["what", "measured"], rows)], targets)


def kill_until_it_ends(stage: Stage, team: Team, program: subprocess.Popen[str], limit_s: float) -> int:
    """Kills one of two workers whenever both are ready, until `program` ends. Returns the number of kills.

    Raises TimeoutError if `program` has not ended after `limit_s` seconds.
    """
    chance, kills = random.Random(1), 0
    ends, next_kill = time.monotonic() + limit_s, time.monotonic() + KILL_EVERY_S
    while program.poll() is None:
        if time.monotonic() > ends:
            raise TimeoutError(f"the client has not ended after {limit_s:g} s and {kills} kills")
        time.sleep(LOOK_S)
        if time.monotonic() < next_kill:
            continue
        ready = {view.pid for view in stage.live(SERVICE) if view.state == "ready"}
        if len(alive := [pid for pid in team.workers if pid in ready]) == 2:
            os.kill(chance.choice(alive), signal.SIGKILL)
            kills, next_kill = kills + 1, time.monotonic() + KILL_EVERY_S
    return kills
