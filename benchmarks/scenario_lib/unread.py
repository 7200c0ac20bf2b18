"""Streams of one client, some of which are never read: what the others get, and how much memory the client takes.

An engine says 200 texts of 4,000 words at once, a word a step. The client reads 180 of them. A delta is often a single
word, so there are more than the client can read: it then reads the text so far, or gets the rest with the reply.
"""

from __future__ import annotations

import json

from measure import Cell, Report, Table, percentile
from stage import Stage

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from scenario_lib.calls import at_least, at_most

STREAMS, UNREAD, WORDS = 200, 20, 4_000
SERVICE = ServiceSpec(
    name="unread",
    model=ModelSpec(type="echo-stream", model_name="sleep:0.015"),
    model_ref="words",
    runtime=Runtime.model_validate({"batch_size": STREAMS, "max_batch_tokens": 4_000_000, "total_timeout": 300.0}),
)
MOST_BYTES = 60e6
"""Memory that the client may take above its start."""

COMPLETE = "finish reason stop"
REST_S = 240.0
"""Seconds that the client may take in all, beside the scenario's own."""


def run(stage: Stage, seconds: float) -> Report:
    stage.workers(SERVICE, 1)
    program = stage.python(
        "scenario_lib/unread_client.py", stage.url, SERVICE.name, str(STREAMS), str(UNREAD), str(WORDS)
    )
    out, _ = program.communicate(timeout=seconds + REST_S)
    found = json.loads(out)
    rows: list[list[Cell]] = [[f"read: {how}", count] for how, count in sorted(found["read"].items())]
    rows += [[f"read late: {how}", count] for how, count in sorted(found["unread"].items())]
    rows += [
        ["pieces of a stream, least", min(found["pieces"])],
        ["pieces of a stream, p50", percentile(found["pieces"], 0.5)],
        ["seconds", found["seconds"]],
        ["words a second", STREAMS * WORDS / found["seconds"]],
        ["memory above the start, MB", found["bytes"] / 1e6],
    ]
    targets = [
        at_least("streams that were read and are complete", found["read"].get(COMPLETE, 0), STREAMS - UNREAD),
        at_least("streams that were read late and are complete", found["unread"].get(COMPLETE, 0), UNREAD),
        at_most("memory above the start, MB", found["bytes"] / 1e6, MOST_BYTES / 1e6),
    ]
    heading = f"{STREAMS} streams of {WORDS:,} words, {UNREAD} of them unread"
    return Report([Table(heading, ["what", "measured"], rows)], targets)
