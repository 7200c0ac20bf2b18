"""A process that embeds without a queue: local_model.py '{"threads": 2, "spec": ...}'. Orders and results as driver.py.

"packing" is the worker's own model, pool and budget; "encode 32" and "encode 64" are SentenceTransformer.encode.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from driver import Order, Result
from sentence_transformers import SentenceTransformer

from millstream.broker.spec import ServiceSpec
from millstream.worker.batcher import Budget, Pool, Row
from millstream.worker.models.base import Prepared
from millstream.worker.models.embedding import EmbeddingModel
from millstream.worker.models.source import locate
from millstream.worker.warmup import warm_up
from millstream.worker.window import Window

Embed = Callable[[Sequence[str]], object]


class Packing:
    """What a worker does to rows, and nothing else: tokenise, pick micro-batches, run them."""

    def __init__(self, spec: ServiceSpec, threads: int) -> None:
        self._model = EmbeddingModel(spec.model, spec.model.device, threads, spec.runtime.truncate)
        window = Window(Budget(spec.runtime.batch_size, spec.runtime.batch_tokens))
        warm_up(self._model, window)
        self._budget = window.budget

    def embed(self, texts: Sequence[str]) -> None:
        pool: Pool[Prepared] = Pool()
        rows = [row for row in self._model.prepare(list(texts), {}) if isinstance(row, Prepared)]
        pool.add(Row(row.tokens, (0, at), "", at, row) for at, row in enumerate(rows))
        while len(pool):
            self._model.forward([row.payload for row in pool.take(self._budget)])


def ways(spec: ServiceSpec, threads: int) -> Mapping[str, Embed]:
    torch.set_num_threads(threads)
    model = SentenceTransformer(str(locate(spec.model.model_name)), device="cpu")
    return {
        "packing": Packing(spec, threads).embed,
        "encode 32": lambda texts: model.encode(list(texts), batch_size=32),
        "encode 64": lambda texts: model.encode(list(texts), batch_size=64),
    }


def main() -> None:
    orders = json.loads(sys.argv[1])
    known = ways(ServiceSpec.from_json(orders["spec"]), orders["threads"])
    for line in sys.stdin:
        order = Order(**json.loads(line))
        cpu, began = time.process_time(), time.perf_counter()
        known[order.service](order.texts)
        result = Result(len(order.texts), time.perf_counter() - began, time.process_time() - cpu)
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
