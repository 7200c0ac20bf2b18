"""A process that embeds without a queue: local_model.py '{"threads": 2, "spec": ...}'. Orders and results as driver.py.

"packing" is the worker's own model, pool and budget; "arrival" and "sorted" cut the same rows by their number alone, in
order of arrival or of length. "encode 32" and "encode 64" are SentenceTransformer.encode. "cosine" compares the vectors
with those of float32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from corpus import batches
from driver import Order, Result
from sentence_transformers import SentenceTransformer

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.job import Vectors
from millstream.worker.measuring.probe import most_tokens
from millstream.worker.measuring.warmup import warm_up
from millstream.worker.models.base import Prepared, packs
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.loading.source import locate
from millstream.worker.scheduling.batcher import Budget, Pool, Row
from millstream.worker.window import Window

Embed = Callable[[Sequence[str]], object]
Batches = Iterable[Sequence[Prepared]]


class Local:
    """What a worker does to rows, and nothing else: tokenise, make batches, run them."""

    def __init__(self, spec: ServiceSpec, threads: int) -> None:
        self._spec = spec
        self._threads = threads
        self._model = EmbeddingModel(spec.model, spec.model.device, threads, spec.runtime.truncate)
        window = Window(Budget(spec.runtime.batch_size, most_tokens(spec.runtime), packs=packs(self._model)))
        warm_up(self._model, window)
        self._budget = window.budget

    def packing(self, texts: Sequence[str]) -> None:
        self._run(self._packed(self._rows(texts)))

    def arrival(self, texts: Sequence[str]) -> None:
        self._run(batches(self._rows(texts), self._budget.rows))

    def sorted(self, texts: Sequence[str]) -> None:
        self._run(batches(sorted(self._rows(texts), key=lambda row: row.tokens), self._budget.rows))

    def cosine(self, texts: Sequence[str]) -> float:
        """The smallest cosine of a text's vector to the one that float32 gives it."""
        exact = self._spec.model.model_copy(update={"dtype": "float32"})
        reference = EmbeddingModel(exact, exact.device, self._threads, self._spec.runtime.truncate)
        ours, theirs = (_vectors(model, self._rows(texts)) for model in (self._model, reference))
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        return float(((ours * theirs).sum(axis=1) / lengths).min())

    def _rows(self, texts: Sequence[str]) -> list[Prepared]:
        return [row for row in self._model.prepare(list(texts), {}) if isinstance(row, Prepared)]

    def _packed(self, rows: Sequence[Prepared]) -> Batches:
        pool: Pool[Prepared] = Pool()
        # As a client sends a list: the long ones first.
        order = sorted(rows, key=lambda row: -row.tokens)
        pool.add(Row(row.tokens, (0, at), "", at, row) for at, row in enumerate(order))
        while len(pool):
            yield [row.payload for row in pool.take(self._budget)]

    def _run(self, made: Batches) -> None:
        for batch in made:
            self._model.forward(batch)


def _vectors(model: EmbeddingModel, rows: Sequence[Prepared]) -> Vectors:
    return np.concatenate([model.forward(batch) for batch in batches(rows, 32)])


def ways(spec: ServiceSpec, local: Local) -> Mapping[str, Embed]:
    kwargs = {"torch_dtype": getattr(torch, spec.model.dtype)}
    model = SentenceTransformer(str(locate(spec.model.model_name)), device="cpu", model_kwargs=kwargs)
    return {
        "packing": local.packing,
        "arrival": local.arrival,
        "sorted": local.sorted,
        "encode 32": lambda texts: model.encode(list(texts), batch_size=32),
        "encode 64": lambda texts: model.encode(list(texts), batch_size=64),
    }


def main() -> None:
    orders = json.loads(sys.argv[1])
    spec = ServiceSpec.from_json(orders["spec"])
    local = Local(spec, orders["threads"])
    known = ways(spec, local)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        cpu, began = time.process_time(), time.perf_counter()
        cosine = local.cosine(order.texts) if order.service == "cosine" else float("nan")
        if order.service != "cosine":
            known[order.service](order.texts)
        seconds, spent = time.perf_counter() - began, time.process_time() - cpu
        sys.stdout.write(json.dumps(asdict(Result(len(order.texts), seconds, spent, cosine=cosine))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
