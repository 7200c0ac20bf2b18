"""One worker process: reads its services from the registry, loads their models, works, drains on request.

The supervisor starts it as `python -P -m millstream.worker.process '{...}'`, with a pipe as standard input. If the pipe
ends, the supervisor is gone, and the worker drains.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from math import inf

from millstream.broker.config.load import ServiceSpec, telemetry_of
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import ConfigError, MillstreamError, ModelUnavailable, described
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, retrying, translated
from millstream.telemetry import logs
from millstream.telemetry.trace_export import exporting
from millstream.telemetry.traces import Tracing
from millstream.telemetry.worker_traces import WorkerTraces
from millstream.worker import host, models
from millstream.worker.context import Context
from millstream.worker.free_memory import give_back_free_memory
from millstream.worker.isolation import Takeover, isolate
from millstream.worker.lane import Lane
from millstream.worker.measuring.agreement import answer_of
from millstream.worker.measuring.cores import Claims
from millstream.worker.measuring.probe import auto_tokens, most_tokens
from millstream.worker.measuring.threads import Threads
from millstream.worker.measuring.warmup import warm_up
from millstream.worker.models.base import Closes, Model
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.shutdown import Relay, Shutdown, ThreadFailed
from millstream.worker.stage_gate import StageGate
from millstream.worker.supervision.charging import NOT_CHARGED, Charged, End, give_back
from millstream.worker.supervision.child_args import EXIT_PERMANENT, ChildArgs
from millstream.worker.supervision.progress import Progress, State
from millstream.worker.window import Window

log = logging.getLogger("millstream.worker.process")  # the module's own name is __main__ in a worker process

ORPHAN_LOOK_S = 1.0
"""Seconds between two checks for stuck threads in a worker whose supervisor is gone."""

STALLED = "made no progress for longer than stall_timeout"

YOUNG_OBJECTS = 10_000
"""New objects after which the garbage collector looks for cycles. The built-in models make none; other models may, with
much memory in each."""

Load = Callable[[ServiceSpec], Model]


class Worker:
    """One worker process, from its arguments to its exit status. `load` makes the model; default: by `child_args`.

    `telemetry`: how to export spans; None if that is the program's own affair.
    """

    def __init__(
        self,
        child_args: ChildArgs,
        url: str,
        load: Load | None = None,
        telemetry: TelemetrySettings | None = None,
    ) -> None:
        self._child_args = child_args
        self._telemetry = telemetry
        self._tracing = Tracing(telemetry.traces if telemetry else "auto")
        self._load = load or self._load_model
        self._pages = {each.service: Progress(each.progress_fd) for each in child_args.hosted}
        self._connection = Connection(url, name=f"millstream-worker-{'+'.join(self._pages)}")
        self._registry = Registry(self._connection, child_args.prefix)
        self._shutdown = Shutdown()
        self._gate = StageGate() if len(self._pages) > 1 else None
        self._claims: Claims | None = None
        self._threads: dict[str, Threads] = {}
        self._failing = child_args.hosted[0].service

    def drain(self) -> None:
        """Stops claiming, settles the held jobs, ends. Must not be called in a signal handler: it takes locks."""
        if self.starting:
            # Nothing is held yet, and a model can take minutes to load.
            os._exit(0)
        self._shutdown.drain()

    @property
    def starting(self) -> bool:
        """Whether the models are still being loaded: then no job is held."""
        return all(page.state is State.STARTING for page in self._pages.values())

    def stuck(self) -> Charged:
        """Stages of the threads that made no progress for longer than stall_timeout, with their entries."""
        return {service: stages for service, page in self._pages.items() if (stages := page.stuck())}

    def snapshots(self) -> Charged:
        """Stages of all threads, with their entries: one of these may be the cause if the process fails."""
        return {service: stages for service, page in self._pages.items() if (stages := page.snapshots())}

    def give_back(self, end: End, charged: Charged = NOT_CHARGED) -> None:
        """Gives the held jobs back to the queue, as a supervisor does for a dead child. Raises BrokerUnavailable."""
        with translated(self._connection.safe_url):
            for service in self._pages:
                lease = Lease(self._connection.client, self._registry.keys(service))
                # No bell: this process's own claimer may be asleep, and would claim what is given back.
                charged_end = end._replace(charged=charged.get(service, ()))
                give_back(lease, self._child_args.consumer, charged_end, ring=False)

    def close(self) -> None:
        self._connection.close()

    def run(self) -> int:
        """Works until drained; returns the exit status."""
        try:
            self.work()
        except (ModelUnavailable, ConfigError) as error:
            return self._report_failure(error, EXIT_PERMANENT)
        except (MillstreamError, ThreadFailed) as error:
            return self._report_failure(error, 1)
        except Exception as error:
            log.debug("unknown error", exc_info=True)
            return self._report_failure(described(error), 1)
        return 0

    def drain_without_supervisor(self) -> None:
        """Drains, and ends the process if a thread is stuck. Called if the supervisor, which would end it, is gone."""
        self.drain()
        while not (stuck := self.stuck()):
            time.sleep(ORPHAN_LOOK_S)
        with suppress(MillstreamError):
            self.give_back(End(STALLED, why="its supervisor is gone"), stuck)
        os._exit(1)

    def work(self) -> None:
        """Works until drained. Raises ModelUnavailable, UnknownService, ConfigError, ThreadFailed, or another error."""
        with ExitStack() as ends:
            if self._telemetry:
                ends.enter_context(exporting(self._telemetry, os.environ, self._child_args.consumer))
            # All models are loaded before any is measured: the memory that they leave is what forwards can use.
            loaded = [self._loaded(service, ends) for service in self._pages]
            host.run([self._lane(spec, model) for spec, model in loaded])

    def _loaded(self, service: str, ends: ExitStack) -> tuple[ServiceSpec, Model]:
        self._failing = service
        spec = retrying(lambda: self._registry.read(service), stop=self._shutdown.stopped)
        model = self._load(spec)
        if isinstance(model, Closes):
            ends.callback(model.close)
        return spec, model

    def _lane(self, spec: ServiceSpec, model: Model) -> Lane:
        self._failing = spec.name
        child_args, threads = self._child_args, self._threads.get(spec.name) or Threads.unmanaged()
        threads.choose(model, use_threads)
        measured = auto_tokens(spec, model)
        budget = Budget(spec.runtime.batch_size, most_tokens(spec.runtime, measured), packs=models.packs(model))
        window = Window(budget, spec.runtime.queue_timeout)
        window.auto_tokens = measured
        warm_up(model, window)
        agreement = spec.model.operation.agreement
        answer = answer_of(model, agreement) if agreement else None
        claim = partial(self._registry.claim_fingerprint, spec.name, model.fingerprint, answer)
        retrying(claim, stop=self._shutdown.stopped)
        context = Context(
            child_args.consumer,
            window,
            shutdown=self._shutdown,
            progress=self._pages[spec.name],
            threads=threads,
            stage=partial(self._gate.stage, spec.name) if self._gate else None,
            service=spec.name,
            traces=self._traces_of(spec),
            order=inf if spec.model.priority is None else spec.model.priority,
            beside=[page for service, page in self._pages.items() if service != spec.name],
        )
        return Lane(context, child_args, self._connection, spec, model, answer)

    def _traces_of(self, spec: ServiceSpec) -> WorkerTraces | None:
        tracer, model = self._tracing.tracer(), spec.model
        if tracer is None:
            return None
        return WorkerTraces(tracer, spec.name, model.model_name, model.operation, self._child_args.consumer)

    def _load_model(self, spec: ServiceSpec) -> Model:
        child_args = self._child_args
        # One entry for the process: its lanes compute one at a time.
        self._claims = self._claims or _claims(spec, child_args.device)
        threads = self._threads[spec.name] = Threads(child_args.threads, os.environ, self._claims)
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

    def _report_failure(self, error: object, status: int) -> int:
        """Notes the reason for the supervisor, which logs it; returns `status`."""
        self._pages[self._failing].set_reason(str(error))
        return status


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


def _drain_at_eof(worker: Worker, supervisor: int) -> None:
    """Drains if the pipe from the supervisor ends: then the supervisor is gone."""
    while os.read(supervisor, 4096):
        pass
    worker.drain_without_supervisor()


def drain_on_signals(worker: Worker) -> None:
    Takeover((signal.SIGTERM, signal.SIGINT), Relay(worker.drain).ring)


def main() -> int:
    child_args = ChildArgs.from_json(sys.argv[1])
    supervisor = isolate(*(each.progress_fd for each in child_args.hosted))
    settings = telemetry_of(os.environ).under(os.environ)
    fields = {"service": "+".join(each.service for each in child_args.hosted), "worker": child_args.consumer}
    logs.set_up(settings, f"worker {child_args.consumer}", fields)
    worker = Worker(child_args, os.environ[URL_VARIABLE], telemetry=settings)
    threading.Thread(target=_drain_at_eof, args=(worker, supervisor), name="parent", daemon=True).start()
    drain_on_signals(worker)
    return worker.run()


if __name__ == "__main__":
    sys.exit(main())
