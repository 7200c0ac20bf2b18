"""What texts with a JSON Schema cost the texts beside them: grammar_neighbours.py prints the time of an engine's step.

Two engines of one model have the same texts: greedy ones, and sampled ones beside them. In one of the engines the
sampled texts follow a schema. Rounds of both take turns, so that what slows the machine slows both. A step adds a token
to each text, so the ratio of their times is what the schema costs the greedy texts. The ratio of CPU times varies less
on a busy machine. Exit status 1 if the median is above 1.05 for the real model, which is the aim. A forward of the tiny
one takes milliseconds, so its ratio is the worst case.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
from bench_generation import SMOLLM2
from measure import interval_of_median, machine
from tiny_llama import save_tiny_llama

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json
from millstream.worker import models
from millstream.worker.engines.base import Engine
from millstream.worker.models.base import Generates, Prepared
from millstream.worker.scheduling.batcher import Row

MOST = 1.05
"""Largest ratio that is aimed at."""

PROMPT = "Three millers of the valley, as JSON: "
PEOPLE: Json = {
    "type": "array",
    "minItems": 1_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "trades": {"type": "array", "items": {"enum": ["miller", "baker", "smith"]}},
            "alive": {"type": "boolean"},
            "note": {"type": ["string", "null"]},
        },
        "required": ["name", "age", "trades", "alive"],
        "additionalProperties": False,
    },
}
"""A schema whose texts do not end while they are measured."""

TOKENS = 1_000
"""Most tokens of a text."""


class Times(NamedTuple):
    """Seconds of a step."""

    wall: float
    cpu: float


class Side:
    """An engine with its texts, all growing."""

    def __init__(self, model: Generates, texts: Sequence[Mapping[str, Json]]) -> None:
        self._engine: Engine = model.start_engine()
        self._texts = len(texts)
        self._engine.admit([row_of(model, at, options) for at, options in enumerate(texts)])
        while self._engine.step().tokens != self._texts:
            pass

    def run(self, steps: int) -> Times:
        """Returns the mean times of a step, over `steps` steps."""
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step = self._engine.step()
            if step.tokens != self._texts or step.rows:
                raise RuntimeError(f"a step over {step.tokens} of {self._texts} texts, {step.outcomes}")
        return Times((time.perf_counter() - began) / steps, (time.process_time() - cpu) / steps)


def row_of(model: Generates, at: int, options: Mapping[str, Json]) -> Row[Prepared]:
    (row,) = cast(Any, model).prepare([PROMPT], {"max_tokens": TOKENS, **options})
    if isinstance(row, MillstreamError):
        raise row
    model.begin(row, f"bench-{at}", ())
    return Row(row.tokens, (0, at), str(at), 0, row)


def load(name: str, threads: int, texts: int) -> Generates:
    spec = ModelSpec(type="llm", model_name=name, device="cpu", dtype="float32", max_length=2_048)
    runtime = Runtime(batch_size=texts, max_batch_tokens=texts * 2_048)
    model = models.load(ServiceSpec(name="bench", model=spec, model_ref="m", runtime=runtime), "cpu", threads)
    if not isinstance(model, Generates):
        raise RuntimeError("the model brings no engine")
    return model


def compared(model: Generates, greedy: int, sampled: int, rounds: int, steps: int) -> list[tuple[Times, Times]]:
    """Returns the times of a step without and with a schema, for each round."""
    plain: list[Mapping[str, Json]] = [{"temperature": 0.0, "ignore_eos": True}] * greedy
    free: Mapping[str, Json] = {"temperature": 0.8, "ignore_eos": True}
    form: Mapping[str, Json] = {"temperature": 0.8, "response_format": {"type": "json_schema", "schema": PEOPLE}}
    sides = [Side(model, [*plain, *[options] * sampled]) for options in (free, form)]
    for side in sides:
        side.run(steps)
    found = []
    for at in range(rounds):
        times = {number: sides[number].run(steps) for number in ((0, 1) if at % 2 else (1, 0))}
        found.append((times[0], times[1]))
    return found


@click.command()
@click.option("--model", "names", type=click.Choice(["tiny", "smollm2"]), multiple=True, default=["tiny", "smollm2"])
@click.option("--greedy", default=8, help="Greedy texts.")
@click.option("--sampled", default=8, help="Sampled texts beside them, with or without a schema.")
@click.option("--threads", default=len(os.sched_getaffinity(0)), help="Threads of a forward.")
@click.option("--rounds", default=11)
@click.option("--steps", default=10, help="Steps of a round.")
def main(names: Sequence[str], greedy: int, sampled: int, threads: int, rounds: int, steps: int) -> None:
    for name, value in machine().items():
        click.echo(f"{name}: {value}")
    click.echo(f"{greedy} greedy texts beside {sampled} sampled ones, {threads} threads, float32, {rounds} rounds")
    click.echo("   model  ms a step, free  ms a step, schema  ratio (95 % interval of the median)  of CPU times")
    ratios = {}
    for name in names:
        with tempfile.TemporaryDirectory() as home:
            model = load(SMOLLM2 if name == "smollm2" else str(save_tiny_llama(Path(home))), threads, greedy + sampled)
            pairs = compared(model, greedy, sampled, rounds, steps)
        free, form = (1_000 * statistics.median(times.wall for times in side) for side in zip(*pairs, strict=True))
        wall, cpu = ([form[at] / free[at] for free, form in pairs] for at in range(2))
        ratios[name] = statistics.median(wall)
        click.echo(f"{name:>8} {free:>16.2f} {form:>18.2f}  {interval(wall):>37}  {interval(cpu)}")
    sys.exit(ratios.get("smollm2", 0.0) > MOST)


def interval(ratios: Sequence[float]) -> str:
    low, high = interval_of_median(ratios)
    return f"{statistics.median(ratios):.3f} ({low:.3f}-{high:.3f})"


if __name__ == "__main__":
    main()
