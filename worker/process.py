"""One worker process: reads its service from the registry, loads the model, works, drains on request.

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
from contextlib import suppress
from functools import partial

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.variables import DEBUG_VARIABLE, URL_VARIABLE
from millstream.broker.contract.errors import ConfigError, MillstreamError, ModelUnavailable, described
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, retrying, translated
from millstream.worker import models
from millstream.worker.context import Context
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
from millstream.worker.supervision.charging import End, give_back
from millstream.worker.supervision.child_args import EXIT_PERMANENT, ChildArgs
from millstream.worker.supervision.progress import Progress, Snapshot, State
from millstream.worker.window import Window

log = logging.getLogger(__name__)

ORPHAN_LOOK_S = 1.0
"""Seconds between two checks for stuck threads in a worker whose supervisor is gone."""

STALLED = "made no progress for longer than stall_timeout"

YOUNG_OBJECTS = 10_000
"""New objects after which the garbage collector looks for cycles. The built-in models make none; other models may, with
much memory in each."""

Load = Callable[[ServiceSpec], Model]


class Worker:
    """One worker process, from its arguments to its exit status. `load` makes the model; default: by `child_args`."""

    def __init__(self, child_args: ChildArgs, url: str, load: Load | None = None) -> None:
        self._child_args = child_args
        self._load = load or self._load_model
        self._connection = Connection(url, name=f"millstream-worker-{child_args.service}")
        self._registry = Registry(self._connection, child_args.prefix)
        self._progress = Progress(child_args.progress_fd)
        self._shutdown = Shutdown()
        self._threads = Threads.unmanaged()

    def drain(self) -> None:
        """Stops claiming, settles the held jobs, ends. Must not be called in a signal handler: it takes locks."""
        if self.starting:
            # Nothing is held yet, and a model can take minutes to load.
            os._exit(0)
        self._shutdown.drain()

    @property
    def starting(self) -> bool:
        """Whether the model is still being loaded: then no job is held."""
        return self._progress.state is State.STARTING

    def stuck(self) -> list[Snapshot]:
        """Stages of the threads that made no progress for longer than stall_timeout, with their entries."""
        return self._progress.stuck()

    def snapshots(self) -> list[Snapshot]:
        """Stages of all threads, with their entries: one of these may be the cause if the process fails."""
        return self._progress.snapshots()

    def give_back(self, end: End) -> None:
        """Gives the held jobs back to the queue, as a supervisor does for a dead child. Raises BrokerUnavailable."""
        lease = Lease(self._connection.client, self._registry.keys(self._child_args.service))
        with translated(self._connection.safe_url):
            give_back(lease, self._child_args.consumer, end)

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
            self.give_back(End(STALLED, stuck, "its supervisor is gone"))
        os._exit(1)

    def work(self) -> None:
        """Works until drained. Raises ModelUnavailable, UnknownService, ConfigError, ThreadFailed, or another error."""
        child_args, stopped = self._child_args, self._shutdown.stopped
        spec = retrying(lambda: self._registry.read(child_args.service), stop=stopped)
        model = self._load(spec)
        try:
            self._serve(spec, model)
        finally:
            if isinstance(model, Closes):
                model.close()

    def _serve(self, spec: ServiceSpec, model: Model) -> None:
        child_args = self._child_args
        self._threads.choose(model, use_threads)
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
            child_args.consumer, window, shutdown=self._shutdown, progress=self._progress, threads=self._threads
        )
        Lane(context, child_args, self._connection, spec, model, answer).work()

    def _load_model(self, spec: ServiceSpec) -> Model:
        child_args = self._child_args
        self._threads = Threads(child_args.threads, os.environ, _claims(spec, child_args.device))
        model = models.load(
            spec.with_handler(child_args.handler), child_args.device, self._threads.count, child_args.folder
        )
        # The loaded objects stay: without freeze, each collection would traverse all of them for the few objects of a
        # job.
        gc.collect()
        gc.freeze()
        if not spec.model.operation.needs_code:
            gc.set_threshold(YOUNG_OBJECTS)
        return model

    def _report_failure(self, error: object, status: int) -> int:
        """Notes the reason for the supervisor, which logs it; returns `status`."""
        self._progress.set_reason(str(error))
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
    supervisor = isolate(child_args.progress_fd)
    level = logging.DEBUG if os.environ.get(DEBUG_VARIABLE) else logging.INFO
    logging.basicConfig(level=level, format=f"worker {child_args.consumer}: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "sentence_transformers", "transformers", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    worker = Worker(child_args, os.environ[URL_VARIABLE])
    threading.Thread(target=_drain_at_eof, args=(worker, supervisor), name="parent", daemon=True).start()
    drain_on_signals(worker)
    return worker.run()


if __name__ == "__main__":
    sys.exit(main())
