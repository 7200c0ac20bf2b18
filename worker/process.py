"""One worker process: reads its service from the registry, loads the model, wires the threads, drains on request.

Started by the supervisor as `python -P -m millstream.worker.process '{...}'`; end of file on standard input means that
the supervisor is gone, and drains too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from millstream.broker.config import Runtime, ServiceSpec
from millstream.broker.connection import Connection, is_transient, retrying
from millstream.broker.errors import Cancelled, ConfigError, MillstreamError, ModelUnavailable, UnknownService
from millstream.broker.job import Reply
from millstream.broker.lease import Beat, Lease
from millstream.broker.registry import Registry
from millstream.broker.streams import Streams
from millstream.worker import models
from millstream.worker.batcher import Budget
from millstream.worker.beat import Heart
from millstream.worker.claimer import SLEEP_S, Claimer
from millstream.worker.clock import ServerClock
from millstream.worker.counters import Counters
from millstream.worker.intake import Intake
from millstream.worker.life import Life, ThreadFailed
from millstream.worker.patience import Patience
from millstream.worker.progress import Progress, State
from millstream.worker.runner import Runner
from millstream.worker.settler import Finished, Settler
from millstream.worker.warmup import warm_up
from millstream.worker.window import Window

log = logging.getLogger(__name__)

EXIT_PERMANENT = 78
"""The exit status of a start that would fail again: wrong configuration, no such model."""

URL_VARIABLE = "MILLSTREAM_REDIS_URL"


@dataclass(frozen=True, slots=True)
class Orders:
    """What the supervisor tells its child; the URL, which may hold a password, travels in the environment."""

    service: str
    prefix: str
    consumer: str
    device: str | None
    threads: int
    progress_fd: int
    result_ttl_ms: int = 3_600_000
    past: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Worker:
    """The threads of one process, and the life they share."""

    def __init__(self, orders: Orders, url: str) -> None:
        self._orders = orders
        self._connection = Connection(url, name=f"millstream-worker-{orders.service}")
        self._registry = Registry(self._connection, orders.prefix)
        self._progress = Progress(orders.progress_fd)
        self._counters = Counters()
        self._life = Life()
        self._started = int(time.time() * 1000)
        self._revision = 0

    def drain(self) -> None:
        """Claim no more; settle what is held; end. Safe in a signal handler."""
        if self._progress.state is State.STARTING:
            # Nothing is held yet, and a model can take minutes to load.
            os._exit(0)
        self._life.drain()

    def run(self) -> None:
        """Until drained. Raises ModelUnavailable, UnknownService, ConfigError at the start, ThreadFailed later."""
        spec = retrying(lambda: self._registry.read(self._orders.service), stop=self._life.stopped)
        model = models.load(spec, self._orders.device, self._orders.threads)
        runtime = spec.runtime
        window = Window(Budget(runtime.batch_size, _batch_tokens(runtime)), runtime.queue_timeout)
        warm_up(model, window)
        retrying(lambda: self._registry.claim_fingerprint(spec.name, model.fingerprint), stop=self._life.stopped)
        self._work(spec, model, window)

    def _work(self, spec: ServiceSpec, model: models.Model, window: Window) -> None:
        keys, consumer = self._registry.keys(spec.name), self._orders.consumer
        clock = ServerClock()
        streams = Streams(self._connection.client, keys, result_ttl_ms=self._orders.result_ttl_ms)
        settler = Settler(streams, window, self._counters, self._life)
        intake, patience = Intake(model, spec.runtime.max_attempts), Patience(spec.runtime.batch_timeout)
        claimer = Claimer(
            consumer,
            streams,
            Streams(self._connection.blocking(SLEEP_S), keys),
            Lease(self._connection.client, keys),
            intake,
            window,
            clock,
            patience,
            settler.put,
            self._life,
        )

        def heard(beat: Beat) -> None:
            clock.heard(beat.now)
            claimer.live_workers = beat.live_workers
            window.end(beat.lost)
            window.forget(beat.lost)
            for held in window.end(beat.cancelled):
                settler.put(Finished(held.claim.address, Reply(error=Cancelled("cancelled by its caller"))))
            if beat.revision != self._revision:
                runtime = self._registry.read(spec.name).runtime
                window.limit(runtime.batch_size, _batch_tokens(runtime), runtime.queue_timeout)
                patience.batch_timeout_s = runtime.batch_timeout
                intake.max_attempts = runtime.max_attempts
                self._revision = beat.revision

        heart = Heart(
            consumer,
            Lease(self._connection.client, keys),
            lambda: self._status(spec, model),
            window.names,
            heard,
            self._life,
        )
        runner = Runner(model, window, clock, self._progress, self._counters, settler.put)
        retrying(streams.create_groups, stop=self._life.stopped)
        self._progress.enter(State.READY)
        # Beat before the first claim: a consumer without a beat would count as lost.
        heart.beat()
        for thread in (heart, settler, claimer):
            thread.start()
        log.info("ready: %s on %s", model.fingerprint, self._orders.device or "auto")
        runner.run()
        self._life.check()
        self._progress.enter(State.DRAINING)
        settler.finish()
        settler.join()
        self._life.check()
        heart.stop()
        heart.join()
        self._leave(Lease(self._connection.client, keys))
        count = self._counters
        log.info("drained after %d jobs: %d rows in %d forwards", count.jobs, count.rows, count.forwards)

    def fail(self, error: Exception, status: int) -> int:
        """Say why, to the terminal and to the supervisor, and give the exit status."""
        log.error("%s", error)
        self._progress.last_words(str(error))
        return status

    def _leave(self, lease: Lease) -> None:
        try:
            lease.release(self._orders.consumer, gone=True)
        except Exception as error:
            # Nothing is held any more; the supervisor, or a reclaim pass, forgets the name.
            if not is_transient(error):
                raise

    def _status(self, spec: ServiceSpec, model: models.Model) -> Mapping[str, str | int]:
        return {
            "state": "draining" if self._life.draining else "ready",
            "service": spec.name,
            "model": spec.model.model_name,
            "fingerprint": model.fingerprint,
            "device": self._orders.device or "auto",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._started,
            "running": len(running := self._progress.running()),
            "running_ms": round((time.monotonic() - self._progress.stamp()) * 1000) if running else 0,
            "past": self._orders.past,
            **self._counters.fields(),
        }


def _batch_tokens(runtime: Runtime) -> int:
    return 2_048 if runtime.max_batch_tokens == "auto" else runtime.max_batch_tokens


def _drain_at_eof(worker: Worker) -> None:
    """Standard input is a pipe from the supervisor: its end is the supervisor's."""
    # Not sys.stdin: the interpreter's exit would wait for its lock.
    while os.read(0, 4096):
        pass
    worker.drain()


def main() -> int:
    orders = Orders(**json.loads(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format=f"worker {orders.consumer}: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "sentence_transformers", "transformers", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    worker = Worker(orders, os.environ[URL_VARIABLE])
    signal.signal(signal.SIGTERM, lambda *_: worker.drain())
    signal.signal(signal.SIGINT, lambda *_: worker.drain())
    threading.Thread(target=_drain_at_eof, args=(worker,), name="parent", daemon=True).start()
    try:
        worker.run()
    except (ModelUnavailable, UnknownService, ConfigError) as error:
        return worker.fail(error, EXIT_PERMANENT)
    except (MillstreamError, ThreadFailed, OSError) as error:
        return worker.fail(error, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
