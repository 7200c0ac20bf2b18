"""One worker process: reads its services from the registry, loads their models, works, drains on request.

The supervisor starts it as `python -P -m millstream.worker.process '{...}'`, with a pipe as standard input. If the pipe
ends, the supervisor is gone, and the worker drains.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress

from millstream.broker.config.load import ServiceSpec, telemetry_of
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import ConfigError, MillstreamError, ModelUnavailable, described
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, translated
from millstream.telemetry import logs
from millstream.telemetry.trace_export import exporting
from millstream.telemetry.traces import Tracing
from millstream.worker import host
from millstream.worker.isolation import Takeover, isolate
from millstream.worker.making import LaneMaker, Load, Place
from millstream.worker.models.base import Closes, Model
from millstream.worker.pool.args import PoolArgs
from millstream.worker.shutdown import Relay, Shutdown, ThreadFailed
from millstream.worker.supervision.charging import NOT_CHARGED, Charged, End, give_back
from millstream.worker.supervision.child_args import EXIT_PERMANENT, ChildArgs
from millstream.worker.supervision.progress import Progress, State

log = logging.getLogger("millstream.worker.process")  # the module's own name is __main__ in a worker process

ORPHAN_LOOK_S = 1.0
"""Seconds between two checks for stuck threads in a worker whose supervisor is gone."""

STALLED = "made no progress for longer than stall_timeout"


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
        self._url = url
        self._pages = {each.service: Progress(each.progress_fd) for each in child_args.hosted}
        self._connection = Connection(url, name=f"millstream-worker-{'+'.join(self._pages)}")
        self._registry = Registry(self._connection, child_args.prefix)
        self._shutdown = Shutdown()
        self._maker = LaneMaker(child_args, self._registry, self._pages, self._tracing, load)

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
            if self._child_args.pool:
                self._run_pool(self._child_args.pool)
                return
            # All models are loaded before any is measured: the memory that they leave is what forwards can use.
            loaded = [self._loaded(service, ends) for service in self._pages]
            place = Place(self._shutdown, self._connection)
            host.run([self._maker.lane(spec, model, place) for spec, model in loaded])

    def _loaded(self, service: str, ends: ExitStack) -> tuple[ServiceSpec, Model]:
        spec, model = self._maker.load(service, self._shutdown)
        if isinstance(model, Closes):
            ends.callback(model.close)
        return spec, model

    def _run_pool(self, args: PoolArgs) -> None:
        # Imported here: other processes do not need it.
        from millstream.worker.pool.pool import Pool

        Pool(args, self._child_args, self._url, self._pages, self._shutdown, self._tracing).work()

    def _report_failure(self, error: object, status: int) -> int:
        """Notes the reason for the supervisor, which logs it; returns `status`."""
        self._pages[self._maker.failing].set_reason(str(error))
        return status


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
