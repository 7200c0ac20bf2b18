"""A process that generates texts without a queue: local_generation.py '{"threads": 2, "spec": ...}'.

It reads an order as a line of JSON, generates all texts of it at once in one of these ways, and answers a line:

    static    model.generate, a batch of SLOTS requests after the other, each as long as its longest text
    manager   transformers' ContinuousBatchingManager
    slots     the worker's own engine, if this version has it; as in a worker, on at most so many threads
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from corpus import batches
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json
from millstream.worker import models
from millstream.worker.engines.base import Engine
from millstream.worker.measuring.threads import Threads
from millstream.worker.models.base import Generates, Prepared
from millstream.worker.models.kernels.cpu import use_threads
from millstream.worker.models.loading.source import locate
from millstream.worker.scheduling.batcher import Row

SLOTS = 16
"""Texts at once, in every way."""

PAGE, MOST_TOKENS, MOST_BATCH = 16, 16_384, 512
"""Sizes of the manager's cache, in tokens: a page, all pages, one forward. Without them it takes 60 % of the memory."""


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the tokens to generate. The model's end token does not end the text."""

    prompt: Sequence[int]
    tokens: int


@dataclass
class Times:
    """Result of an order: its seconds; for each request the seconds to its first token and to its end, and its text."""

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


Way = Callable[[Sequence[Request]], Times]


class Library:
    """The model as transformers runs it."""

    def __init__(self, spec: ServiceSpec, threads: int) -> None:
        self._threads = threads
        folder = locate(spec.model.model_name)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec.model.dtype))
        # None of the requests ends before its number of tokens.
        self._config = GenerationConfig.from_dict({"do_sample": False, "eos_token_id": None, "pad_token_id": 0})
        self._model.generation_config = self._config

    def static(self, requests: Sequence[Request]) -> Times:
        use_threads(self._threads)
        times, began = Times(), time.perf_counter()
        for batch in batches(requests, SLOTS):
            longest = max(len(each.prompt) for each in batch)
            ids = torch.tensor([[0] * (longest - len(each.prompt)) + list(each.prompt) for each in batch])
            mask = torch.tensor([[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in batch])
            with torch.inference_mode():
                made = self._model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max(each.tokens for each in batch)
                )
            ended = time.perf_counter() - began
            for row, request in zip(made[:, longest:].tolist(), batch, strict=True):
                # Its caller sees nothing before the batch has ended.
                times.first.append(ended)
                times.last.append(ended)
                times.text.append(self._decoded(row[: request.tokens]))
        times.seconds = time.perf_counter() - began
        return times

    def manager(self, requests: Sequence[Request]) -> Times:
        # Its thread begins with the number that was set last.
        use_threads(self._threads)
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=MOST_TOKENS // PAGE,
            max_batch_tokens=MOST_BATCH,
            max_requests_per_batch=SLOTS,
            allow_block_sharing=False,
        )
        # It writes into its configuration.
        config = GenerationConfig.from_dict(self._config.to_dict() | {"eos_token_id": -1})
        manager = self._model.init_continuous_batching(config, settings)
        manager.start()
        try:
            return self._managed(manager, requests)
        finally:
            manager.stop(block=True)

    def _managed(self, manager: Any, requests: Sequence[Request]) -> Times:
        # The first request waits for the cache to be made.
        manager.add_request(list(requests[0].prompt), request_id="warm-up", max_new_tokens=1)
        _result(manager)
        began = time.perf_counter()
        for at, each in enumerate(requests):
            manager.add_request(
                list(each.prompt), request_id=str(at), max_new_tokens=each.tokens, record_timestamps=True
            )
        found = {result.request_id: result for result in (_result(manager) for _ in requests)}
        times = Times(seconds=time.perf_counter() - began)
        for at in range(len(requests)):
            result = found[str(at)]
            times.first.append(result.timestamps[0] - began)
            times.last.append(result.timestamps[-1] - began)
            times.text.append(self._decoded(result.generated_tokens))
        return times

    def _decoded(self, ids: Sequence[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=True))


def _result(manager: Any) -> Any:
    while (result := manager.get_result(timeout=1.0)) is None:
        if not manager.is_running():
            raise RuntimeError("the manager's thread has ended")
    if result.error:
        raise RuntimeError(f"the manager failed: {result.error}")
    return result


class Slots:
    """The worker's model and engine, stepped here."""

    def __init__(self, spec: ServiceSpec, threads: int) -> None:
        self._model = models.load(spec, spec.model.device, threads)
        if not isinstance(self._model, Generates):
            raise RuntimeError("the model brings no engine")
        self._engine: Engine = self._model.start_engine()
        self._threads = Threads(threads)
        self._threads.choose(self._model, use_threads)

    def slots(self, requests: Sequence[Request]) -> Times:
        waiting = deque(self._row(at, each) for at, each in enumerate(requests))
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        text: dict[str, str] = {}
        self._threads.apply()
        began = time.perf_counter()
        while waiting or self._engine.busy:
            self._engine.admit(self._next(waiting))
            start = time.perf_counter()
            step = self._engine.step()
            self._threads.observe(step.tokens, time.perf_counter() - start)
            now = time.perf_counter() - began
            for row in (*(row for row, _ in step.records), *step.rows):
                first.setdefault(row.owner, now)
            for row, outcome in zip(step.rows, step.outcomes, strict=True):
                if isinstance(outcome, MillstreamError):
                    raise outcome
                last[row.owner] = now
                text[row.owner] = str(cast(Mapping[str, object], outcome)["text"])
            waiting.extendleft(reversed(step.displaced))
        names = [str(at) for at in range(len(requests))]
        times = Times(time.perf_counter() - began)
        times.first, times.last = [first[name] for name in names], [last[name] for name in names]
        times.text = [text[name] for name in names]
        return times

    def _row(self, at: int, request: Request) -> Row[Prepared]:
        model = self._model
        prompt: Json = {"token_ids": list(request.prompt)}
        (row,) = model.prepare([prompt], options(request))
        if isinstance(row, MillstreamError):
            raise row
        cast(Generates, model).begin(row, f"bench-{at}", ())
        return Row(row.tokens, (0, at), str(at), 0, row)

    def _next(self, waiting: deque[Row[Prepared]]) -> list[Row[Prepared]]:
        room = self._engine.room()
        if room is None:
            raise RuntimeError("the engine has no slots")
        rows: list[Row[Prepared]] = []
        tokens = 0
        while waiting and len(rows) < room.rows and (tokens := tokens + waiting[0].tokens) <= room.tokens:
            rows.append(waiting.popleft())
        return rows


def options(request: Request) -> dict[str, Any]:
    """Returns the options of a call through the queue that generates what the other ways do."""
    return {"max_tokens": request.tokens, "temperature": 0.0, "ignore_eos": True}


def ways(spec: ServiceSpec, threads: int) -> Mapping[str, Way]:
    library = Library(spec, threads)
    known: dict[str, Way] = {"static": library.static, "manager": library.manager}
    if spec.model.operation.runs:
        known["slots"] = Slots(spec, threads).slots
    return known


def main() -> None:
    orders = json.loads(sys.argv[1])
    known = ways(ServiceSpec.from_json(orders["spec"]), orders["threads"])
    # The libraries print to standard output, too: answers have a line of their own there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        times = known[order["way"]]([Request(*each) for each in order["requests"]])
        answers.write(json.dumps(asdict(times)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
