"""Makes the lanes of a worker process: loads the model of a service, measures it, and connects the lane."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import inf

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.queue.figure_text import memory
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, retrying
from millstream.telemetry.traces import Tracing
from millstream.telemetry.worker_traces import WorkerTraces
from millstream.worker import models
from millstream.worker.context import Context
from millstream.worker.forward_cost import ForwardCost
from millstream.worker.free_memory import give_back_free_memory
from millstream.worker.lane import Lane
from millstream.worker.measuring.agreement import answer_of
from millstream.worker.measuring.cores import Claims
from millstream.worker.measuring.memory_use import Meter
from millstream.worker.measuring.probe import auto_tokens, most_tokens, run
from millstream.worker.measuring.threads import Threads
from millstream.worker.measuring.warmup import SHORT_TOKENS, sample, warm_up
from millstream.worker.models.base import Model
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.shutdown import Shutdown
from millstream.worker.stage_gate import StageGate
from millstream.worker.supervision.child_args import ChildArgs
from millstream.worker.supervision.progress import Progress
from millstream.worker.window import Window

YOUNG_OBJECTS = 10_000
"""New objects after which the garbage collector looks for cycles. The built-in models make none; other models may, with
much memory in each."""

Load = Callable[[ServiceSpec], Model]


@dataclass(frozen=True, slots=True)
class Place:
    """Things that a lane shares with others. `turn` gives the device to the calling thread for one forward.

    `figures` returns fields for its heartbeat. `number` counts the lanes of its service in this process, from 0.
    """

    shutdown: Shutdown
    connection: Connection
    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    figures: Callable[[], Mapping[str, str | int]] = dict
    number: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a model, as measured. `held`: with the peak of its warm-up. `loading`: most while it was loaded."""

    held: int = 0
    loading: int = 0


class LaneMaker:
    """Makes the lanes of one process. `load` makes the model; default: by `child_args`. `meter` measures its size.

    `failing` is the service that was worked on last. What is measured of a model holds for its later loads, too.
    """

    def __init__(
        self,
        child_args: ChildArgs,
        registry: Registry,
        pages: Mapping[str, Progress],
        tracing: Tracing,
        load: Load | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._child_args = child_args
        self._registry = registry
        self._pages = pages
        self._tracing = tracing
        self._load = load or self._load_model
        self._meter = meter or models.meter_of(child_args.device)
        self._gate = StageGate() if len(pages) > 1 else None
        self._claims: Claims | None = None
        self._threads: dict[str, Threads] = {}
        self._costs: dict[str, ForwardCost] = {}
        self._tokens: dict[str, int | None] = {}
        self._began: dict[str, int] = {}
        self._loading: dict[str, int] = {}
        self._forwards: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self.sizes: dict[str, Size] = {}
        self.failing = child_args.hosted[0].service

    def load(self, service: str, stop: Shutdown) -> tuple[ServiceSpec, Model]:
        """Reads the service and loads its model. Raises ModelUnavailable, UnknownService, ConfigError or any other."""
        self.failing = service
        spec = retrying(lambda: self._registry.read(service), stop=stop.stopped)
        self._began[service] = self._meter.used()
        self._meter.begin()
        model = self._load(spec)
        self._loading[service] = self._meter.peak()
        self._meter.begin()
        return spec, model

    def lane(self, spec: ServiceSpec, model: Model, place: Place) -> Lane:
        """Measures `model`, and makes its lane. Raises ModelUnavailable, also if it needs more than `memory_limit`."""
        self.failing = name = spec.name
        threads = self._threads.get(name) or Threads.unmanaged()
        with _in_turns(model, place.turn):
            threads.choose(model, use_threads)
            window = self._measured(spec, model)
            agreement = spec.model.operation.agreement
            answer = answer_of(model, agreement) if agreement else None
        self._measure_size(spec)
        claim = partial(self._registry.claim_fingerprint, name, model.fingerprint, answer)
        retrying(claim, stop=place.shutdown.stopped)
        context = Context(
            self._child_args.consumer,
            window,
            shutdown=place.shutdown,
            progress=self._pages[name],
            threads=threads,
            stage=partial(self._gate.stage, name) if self._gate else None,
            service=name,
            traces=self._traces_of(spec),
            beside=[page for service, page in self._pages.items() if service != name],
            order=inf if spec.model.priority is None else spec.model.priority,
            figures=place.figures,
            number=place.number,
        )
        return Lane(context, self._child_args, place.connection, spec, model, answer)

    def forget(self, service: str) -> None:
        """Drops the model of a service. What was measured of it stays."""
        if threads := self._threads.get(service):
            threads.forget()

    def _measured(self, spec: ServiceSpec, model: Model) -> Window:
        """A window with the measured limits and costs of a forward. At a later load one forward is enough."""
        earlier = self._costs.get(spec.name)
        if earlier is None:
            self._tokens[spec.name] = auto_tokens(spec, model)
        measured = self._tokens[spec.name]
        budget = Budget(spec.runtime.batch_size, most_tokens(spec.runtime, measured), packs=models.packs(model))
        window = Window(budget, spec.runtime.queue_timeout)
        window.auto_tokens = measured
        if earlier is None:
            warm_up(model, window)
        else:
            window.cost.resume(earlier)
            if model.samples(SHORT_TOKENS):
                run(model, [sample(model, SHORT_TOKENS)])
        self._costs[spec.name] = window.cost
        return window

    def _measure_size(self, spec: ServiceSpec) -> None:
        """Notes the size of the model. Raises ModelUnavailable if it exceeds the service's `memory_limit`."""
        began, used = self._began[spec.name], self._meter.used()
        # A later load runs no full warm-up, so its peak says nothing new. But it says more of the weights: the first
        # one may import libraries.
        forward = self._forwards.setdefault(spec.name, max(0, self._meter.peak() - used))
        held = max(0, used - began) + forward
        peak = max(self._loading[spec.name], self._meter.peak()) - began
        if spec.name in self.sizes:
            # The most of all later loads: what a load needs varies with what runs beside it.
            peak = self._peaks[spec.name] = max(peak, self._peaks.get(spec.name, 0))
        self.sizes[spec.name] = Size(held, max(held, peak))
        limit = spec.runtime.memory_limit
        if limit is not None and held > limit:
            raise ModelUnavailable(
                f"service {spec.name!r}: its model takes {memory(held)}, and memory_limit is {memory(limit)}",
                hint="raise memory_limit, or lower batch_size or max_batch_tokens",
            )

    def _traces_of(self, spec: ServiceSpec) -> WorkerTraces | None:
        tracer, model = self._tracing.tracer(), spec.model
        if tracer is None:
            return None
        return WorkerTraces(tracer, spec.name, model.model_name, model.operation, self._child_args.consumer)

    def _load_model(self, spec: ServiceSpec) -> Model:
        child_args = self._child_args
        # One entry for the process: its lanes compute one at a time.
        self._claims = self._claims or _claims(spec, child_args.device)
        threads = self._threads.setdefault(spec.name, Threads(child_args.threads, os.environ, self._claims))
        (hosted,) = [each for each in child_args.hosted if each.service == spec.name]
        model = models.load(hosted.settings(spec), child_args.device, threads.count, child_args.folder)
        # The loaded objects stay: without freeze, each collection would traverse all of them for the few objects of a
        # job.
        gc.collect()
        gc.freeze()
        give_back_free_memory()
        if not spec.model.operation.needs_code:
            gc.set_threshold(YOUNG_OBJECTS)
        return model


@contextmanager
def _in_turns(model: Model, turn: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Makes each forward of `model` take a turn of the device meanwhile, since lanes of other models may have it."""
    if turn is nullcontext:
        yield
        return
    forward = model.forward

    def forward_in_turn(rows: list) -> object:  # type: ignore[type-arg]
        with turn():
            return forward(rows)

    model.forward = forward_in_turn  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.forward


def _claims(spec: ServiceSpec, device: str | None) -> Claims | None:
    """Enters this process among those that compute on the host's cores; None if its device or model needs none."""
    if not spec.model.operation.computes or device not in (None, "auto", "cpu"):
        return None
    claims = Claims()
    claims.enter()
    return claims


def use_threads(count: int) -> None:
    """Makes the calling thread's forwards run on `count` threads of torch."""
    # Imported here: torch takes seconds to import, and workers of other model types do not need it.
    from millstream.worker.models.kernels import cpu

    cpu.use_threads(count)
