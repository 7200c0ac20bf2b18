"""A process that runs a model's forwards without a queue: threads_model.py '{"spec": ...}', and a line an order.

{"threads": 2, "seconds": 1.0} answers {"threads": 2, "rate": ...}, tokens a second on so many threads. With 0 threads
it answers how many a worker that starts now would choose.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import cycle

from corpus import mix

from millstream.broker.config.spec import ServiceSpec
from millstream.worker.measuring.cores import cores
from millstream.worker.measuring.probe import most_tokens
from millstream.worker.measuring.threads import fastest, measure
from millstream.worker.measuring.tuning import micro_batches
from millstream.worker.models.base import Prepared
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.kernels.cpu import use_threads
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.window import Window

TEXTS = 200


class Forwards:
    """A model and its micro-batches, as a worker packs them."""

    def __init__(self, spec: ServiceSpec) -> None:
        self._model = EmbeddingModel(spec.model, "cpu", cores(), "end")
        window = Window(Budget(spec.runtime.batch_size, most_tokens(spec.runtime), packs=self._model.packs))
        rows = [row for row in self._model.prepare(mix(TEXTS), {}) if isinstance(row, Prepared)]
        self._batches = cycle(micro_batches(rows, window))

    def rate(self, threads: int, seconds: float) -> float:
        """Tokens a second."""
        use_threads(threads)
        self._model.forward(next(self._batches))
        tokens, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds:
            batch = next(self._batches)
            self._model.forward(batch)
            tokens += sum(row.tokens for row in batch)
        return tokens / spent

    def choice(self) -> int:
        return fastest(measure(self._model, cores(), use_threads), cores())


def main() -> None:
    forwards = Forwards(ServiceSpec.from_json(json.loads(sys.argv[1])["spec"]))
    for line in sys.stdin:
        order = json.loads(line)
        threads = order["threads"] or forwards.choice()
        rate = forwards.rate(threads, order["seconds"]) if order["threads"] else 0.0
        sys.stdout.write(json.dumps({"threads": threads, "rate": rate}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
