"""Two `millstream worker run` of one worker each, on one host, beside one that runs two: 5,000 texts each time.

The real all-MiniLM-L6-v2 and short texts. The two ways take turns, each with workers of its own that are ready and have
seen each other; each round is one ratio.
"""

from __future__ import annotations

import time

from bench_embed import MODEL
from corpus import payloads
from measure import Report, Rounds, Table, Target
from stage import Stage, Team, until

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.client import Client
from millstream.worker.measuring.cores import cores

SPEC = ServiceSpec(
    name="separate",
    model=ModelSpec(type="embedding", model_name=MODEL, device="cpu"),
    model_ref="minilm",
    runtime=Runtime.model_validate({"batch_size": 64}),
)
TEXTS, LENGTH = 5_000, 24
ROUNDS = 2
LEAST = 0.95


def run(stage: Stage, seconds: float) -> Report:
    """`seconds` is the most that one call may take."""
    rounds = Rounds()
    for _ in range(ROUNDS):
        rounds.add("together", _rate(stage, [2], seconds))
        rounds.add("apart", _rate(stage, [1, 1], seconds))
    together, apart = rounds["together"], rounds["apart"]
    ratio = apart.over(together)
    table = Table(
        f"{TEXTS:,} short texts on two workers",
        ["started by", "texts/s"],
        [["one supervisor", together], ["two supervisors", apart], ["two / one", ratio]],
    )
    return Report([table], [Target("two supervisors / one", ratio, ">=", LEAST)])


def _rate(stage: Stage, counts: list[int], seconds: float) -> float:
    """Texts a second of a call, on supervisors with so many workers each, which end afterwards."""
    teams: list[Team] = [stage.workers(SPEC, count) for count in counts]
    texts = payloads(TEXTS, LENGTH)
    with Client(stage.url) as client:
        until(lambda: _shared(stage, client, texts[:512]))
        began = time.monotonic()
        client.submit(SPEC.name, texts, timeout=seconds).result()
        rate = TEXTS / (time.monotonic() - began)
    for team in teams:
        team.stop()
    until(lambda: not stage.live(SPEC))
    return rate


def _shared(stage: Stage, client: Client, texts: list[str]) -> bool:
    """Whether the workers use each core once; they change their threads before a forward."""
    client.submit(SPEC.name, texts).result()
    return sum(view.threads for view in stage.live(SPEC)) <= max(2, cores())
