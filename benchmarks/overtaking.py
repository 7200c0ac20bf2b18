"""What overtaking costs and gains: overtaking.py prints throughput and p99 of 128 callers, by simulation.

Each caller has one text under way. A worker whose model pads runs the oldest row and its neighbours in length, as it
does, but chooses among the oldest rows alone: so many tokens of them. One whose model packs runs the oldest rows. A
forward costs the tokens it computes and 66 more, as measured here.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import replace

import click
from corpus import mix

from millstream.client.split import estimate_tokens
from millstream.worker.scheduling.batcher import Budget, Pool, Row

BUDGET = Budget(64, 2_048, 66.0)
CALLERS, TEXTS, SKIPPED = 128, 6_000, 1_000
TOKENS = (2_048, 3_072, 4_096, 6_144, 1 << 30)


def simulate(most_tokens: int, budget: Budget = BUDGET) -> tuple[float, float]:
    """Texts a token's time, and p99 of a call / (callers / throughput)."""
    lengths = itertools.cycle([min(256, estimate_tokens(len(text.encode()))) for text in mix(2_000)])
    numbers = itertools.count()
    waiting = deque((0.0, next(lengths)) for _ in range(CALLERS))
    pool: Pool[float] = Pool()
    now, latencies = 0.0, list[float]()
    while len(latencies) < TEXTS:
        while waiting and pool.tokens < most_tokens:
            since, tokens = waiting.popleft()
            pool.add([Row(tokens, (0, next(numbers)), "", 0, since)])
        batch = pool.take(budget)
        now += budget.overhead + budget.computed(batch)
        latencies += [now - row.payload for row in batch]
        waiting.extend((now, next(lengths)) for _ in batch)
    kept = sorted(latencies[SKIPPED:])
    throughput = CALLERS * len(kept) / sum(kept)
    return throughput, kept[len(kept) * 99 // 100] * throughput / CALLERS


def main() -> None:
    found = {str(tokens): simulate(tokens) for tokens in TOKENS}
    found["all"] = found.pop(str(TOKENS[-1]))
    found["packed"] = simulate(TOKENS[-1], replace(BUDGET, packs=True))
    usual = found["6144"][0]
    click.echo("tokens to choose among  throughput  p99 / (callers / throughput)")
    for name, (throughput, p99) in found.items():
        click.echo(f"{name:>22}  {throughput / usual:>10.2f}  {p99:>28.2f}")


if __name__ == "__main__":
    main()
