"""One service in one worker process: creates its threads, connects them, starts them, and drains them in order."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

from millstream.broker.config.load import Runtime, ServiceSpec
from millstream.broker.contract.answer import Answer
from millstream.broker.contract.errors import ConfigError, UnknownService
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.cache import Cache, CacheKey
from millstream.broker.queue.lease import Beat, Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.slots import SharedSlots
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams
from millstream.broker.transport.connection import Connection, is_transient, retrying
from millstream.worker.context import Context
from millstream.worker.engines.base import Engine, Remote
from millstream.worker.engines.one_shot import OneShot
from millstream.worker.engines.runner import Runner
from millstream.worker.intake.cache_writer import CacheWriter
from millstream.worker.intake.claimer import SLEEP_S, Claimer, Policy, Queue
from millstream.worker.intake.emitter import Emitter
from millstream.worker.intake.hand_over import HandOver, Others
from millstream.worker.intake.heartbeat import Heartbeat, Watch
from millstream.worker.intake.inference_timeout import HUNG_STEP_S, InferenceTimeout
from millstream.worker.intake.intake import Intake, cancelled
from millstream.worker.intake.settler import Settler
from millstream.worker.measuring.probe import most_tokens
from millstream.worker.models.base import (
    ANY_LENGTH,
    Adapts,
    BringsEngine,
    Foresees,
    Generates,
    Laps,
    Model,
    Placed,
    Reads,
    SharesSlots,
)
from millstream.worker.scheduling.batch_delay import BatchDelay
from millstream.worker.scheduling.fair_share import SAVED_BATCHES, FairShare
from millstream.worker.scheduling.slack import targets
from millstream.worker.supervision.child_args import ChildArgs
from millstream.worker.supervision.progress import MOST_ENTRIES, State
from millstream.worker.supervision.registrar import Registration

log = logging.getLogger(__name__)

MOST_ROWS = MOST_ENTRIES - 2 * MAX_JOBS_PER_CALL
"""Most rows of a forward, even if batch_size is larger: one job a row, and a claim on top, must fit a track's list."""

SETTLE_S = 2.0
"""Seconds that a failing process waits until its finished answers are written."""


class Lane:
    """Claimer, settler, heartbeat and inference timeout around the runner, for one service and one loaded model."""

    def __init__(
        self,
        context: Context,
        child_args: ChildArgs,
        connection: Connection,
        spec: ServiceSpec,
        model: Model,
        answer: Answer | None = None,
    ) -> None:
        self._context = context
        self._child_args = child_args
        self._spec = spec
        self._model = model
        self._answer = answer
        self._registry = Registry(connection, child_args.prefix)
        keys = self._registry.keys(spec.name)
        self._lease = Lease(connection.client, keys)
        self._streams = Streams(connection.own(), keys, result_ttl_ms=round(spec.result_ttl * 1000))
        # By the settings it was loaded with, not by those pushed later: they determine its answers.
        cache_key = CacheKey.of(spec, model.fingerprint, model.op)
        self._cache_writer = CacheWriter(Cache(connection.client, keys), cache_key)
        self._progress = context.progress
        self._intake = Intake(model, spec.runtime.max_attempts, track=self._progress.claimer)
        self._policy = Policy(BatchDelay(0.0), {}, FairShare({}, 0), supervised=child_args.supervised)
        self._settler = Settler(context, self._streams, self._cache_writer, model.fingerprint)
        self._claimed_streams = Streams(connection.blocking(SLEEP_S), keys)
        queue = Queue(self._claimed_streams, self._lease)
        self._claimer = Claimer(context, queue, self._intake, self._policy, self._settler.put)
        self._inference_timeouts: dict[Priority, float | None] = {}
        self._registration = Registration(self._registry, spec)
        watch = Watch(self._status, self._apply_beat, self._registration.keep, lambda: context.is_stuck)
        self._heartbeat = Heartbeat(context, self._lease, watch)
        self._engine: Engine = OneShot(model, context.progress.runner.lap, context.window.cost)
        self._emitter: Emitter | None = None
        self._hand_over: HandOver | None = None
        if isinstance(model, SharesSlots):
            shares = SharedSlots(connection.own(), model.url, f"{context.consumer}/{spec.name}", child_args.prefix)
            model.share_by(shares, lambda: context.window.waiting_rows)
        if isinstance(model, BringsEngine):
            self._engine = model.start_engine()
        if isinstance(self._engine, Remote):
            context.window.wake = self._engine.wake
        if isinstance(model, Generates):
            self._emitter = Emitter(context, Streams(connection.own(), keys), context.window.end)
            self._hand_over = HandOver(context, self._lease, self._emitter, self._others(), child_args.drain_s)
        limits, finish = self._inference_timeouts, self._settler.put
        self.runner = Runner(context, self._engine, finish, self._emitter, limits, self._hand_over)
        grace_s = HUNG_STEP_S if context.window.has_slots else 0.0
        self._inference_timeout = InferenceTimeout(context, limits, finish, grace_s)
        self._revision = 0
        self._unknown_entries: set[str] = set()
        self._began = time.monotonic()
        self._limit(spec.runtime)
        if isinstance(model, Foresees):
            model.foresee(context.window.upcoming)
        if isinstance(model, Laps):
            model.lap_by(self._intake.lap)

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Stores `wake`, to be called when rows may be taken and when no more will come."""
        own = self._engine.wake if isinstance(self._engine, Remote) else None

        def wake_both() -> None:
            wake()
            if own:
                own()

        self._context.window.wake = wake_both if own else wake

    def start(self) -> None:
        """Starts the threads, which claim and settle. The main thread then runs the `runner`."""
        context = self._context
        retrying(self._streams.create_groups, stop=context.shutdown.stopped)
        self._progress.enter(State.READY)
        # Beat before the first claim: a consumer without a heartbeat counts as lost.
        self._heartbeat.beat()
        beside = (self._inference_timeout, self._emitter, self._hand_over)
        for thread in (self._heartbeat, self._settler, *beside, self._claimer):
            if thread:
                thread.start()
        self._log_ready()

    def drain(self) -> None:
        """Settles what the runner finished, and ends the threads in order. Raises ThreadFailed."""
        context = self._context
        context.shutdown.check()
        if not context.shutdown.evicting:
            self._progress.enter(State.DRAINING)
        self._inference_timeout.stop()
        self._inference_timeout.join()
        self._stop_emitter()
        self._settler.finish()
        self._settler.join()
        context.shutdown.check()
        self._heartbeat.stop()
        self._heartbeat.join()
        self._heartbeat.flush()
        self._leave()
        count = context.counters
        log.info("drained after %d jobs: %d rows in %d forwards", count.jobs, count.rows, count.forwards)

    def announce(self) -> None:
        """Publishes its state soon."""
        self._heartbeat.beat_soon()

    @property
    def job_s(self) -> float:
        """Mean seconds of the device for a job; 0.0 before the first one."""
        count = self._context.counters
        return count.busy_ms / 1000 / count.jobs if count.jobs else 0.0

    def stop(self) -> None:
        """Ends the threads of a process that failed. After `drain` it does nothing."""
        # If the program goes on, further beats would extend the lease of jobs that nobody runs.
        self._heartbeat.stop()
        self._inference_timeout.stop()
        if self._hand_over:
            self._hand_over.finish()
        if self._emitter:
            self._emitter.stop()
        self._settler.finish()
        self._context.shutdown.drain()

    def await_settled(self) -> None:
        """Waits until the finished answers of a process that failed are written, for at most SETTLE_S seconds."""
        if self._settler.is_alive():
            self._settler.join(SETTLE_S)

    def _others(self) -> Others:
        consumer = self._child_args.consumer
        return Others(
            live=lambda: self._claimer.live_workers > 1,
            ready=lambda: self._lease.has_ready_worker(consumer),
            announce=self._heartbeat.beat_soon,
        )

    def _stop_emitter(self) -> None:
        if self._hand_over:
            self._hand_over.finish()
            self._hand_over.join()
        if self._emitter:
            self._emitter.stop()
            self._emitter.join()

    def _log_ready(self) -> None:
        window, device = self._context.window, self._child_args.device or "auto"
        how = " (measured)" if window.auto_tokens else ""
        limits = f"{window.budget.rows} rows and {window.budget.tokens} tokens{how}"
        packed = ", texts packed" if window.budget.packs else ""
        reads = f", reads {self._model.limit}" if isinstance(self._model, Reads) else ""
        threads = f" with {self._context.threads}" if self._on_cpu else ""
        log.info(
            "ready: %s on %s%s, at most %s a forward%s%s",
            self._model.fingerprint,
            device,
            threads,
            limits,
            packed,
            reads,
        )

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self._model, Placed) and self._model.device_type == "cpu"

    def _apply_beat(self, beat: Beat) -> None:
        """Applies the server's answer to a heartbeat."""
        window = self._context.window
        self._context.clock.set_to(beat.now)
        self._context.threads.update_share()
        self._claimer.live_workers = beat.ready_workers
        window.end(beat.lost)
        window.forget(beat.lost)
        for job in window.cancel(beat.cancelled):
            self._settler.put(cancelled(job))
        self._return_unknown_entries(beat.unknown)
        if beat.revision != self._revision:
            self._renew()
            self._revision = beat.revision

    def _return_unknown_entries(self, entries: list[str]) -> None:
        """Gives back entries that were delivered to this worker but never arrived, as after a cut connection.

        An entry is given back if two beats in a row report it: at one beat the reply to its claim may be on its way.
        """
        again = self._unknown_entries.intersection(entries)
        self._unknown_entries = set(entries)
        if again and (returned := self._lease.release(self._child_args.consumer, only=again)):
            log.warning("%d jobs were delivered to a connection that was cut; they are given back", returned)

    def _renew(self) -> None:
        """Applies settings pushed since the last beat. Raises ConfigError if the service runs other weights now."""
        self._registration.keep()
        self._claimed_streams.forget_fairness()
        self._streams.forget_fairness()
        try:
            self._limit(self._registry.read(self._spec.name).runtime)
        except (UnknownService, ConfigError) as error:
            log.warning("the limits stay unchanged: %s", error)
            return
        # Claimed again, since a push forgets the weights of a service without live workers. This worker is live now.
        self._registry.claim_fingerprint(self._spec.name, self._model.fingerprint, self._answer)

    def _limit(self, runtime: Runtime) -> None:
        limits = {each: runtime.limits(each.value) for each in PRIORITIES}
        # Rows that get slots one by one need not wait for others.
        waits = {
            each: 0.0 if self._context.window.has_slots else limits[each].batch_timeout or 0.0 for each in PRIORITIES
        }
        self._policy.batch_timeouts.update(waits)
        self._inference_timeouts.update({each: limits[each].inference_timeout for each in PRIORITIES})
        shortest = min((each for each in self._inference_timeouts.values() if each), default=None)
        window = self._context.window
        tokens = most_tokens(runtime, window.auto_tokens)
        rows = min(runtime.batch_size, MOST_ROWS)
        is_fair = runtime.fair is not None
        window.limit(rows, tokens, runtime.queue_timeout, shortest, runtime.reserved_slots, is_fair)
        shares = {each: runtime.shares[each.value] for each in PRIORITIES}
        if self._context.stage:
            window.targets = targets(runtime.target)
        self._policy.fair_share.change(shares, SAVED_BATCHES * runtime.batch_size)
        self._intake.max_attempts = runtime.max_attempts
        self._cache_writer.ttl_s = runtime.cache_s
        self._intake.digests = None if runtime.cache_s is None else self._cache_writer.digests
        if isinstance(self._model, Adapts):
            self._model.adapt(runtime)
        self._progress.stall_s = runtime.stall_s

    def _leave(self) -> None:
        try:
            # A process whose lane was evicted lives on for its service, and loads the model again when it is needed.
            self._lease.release(self._child_args.consumer, gone=not self._context.shutdown.evicting)
        except Exception as error:
            # No entry is held any more; the supervisor or a reclaim pass removes the consumer.
            if not is_transient(error):
                raise

    def _state(self) -> str:
        if self._context.shutdown.draining:
            return "evicting" if self._context.shutdown.evicting else "draining"
        if isinstance(self._engine, Remote) and self._engine.away:
            return "away"
        return "paused" if self._claimer.paused else "ready"

    def _status(self) -> Mapping[str, str | int]:
        return {
            "state": self._state(),
            "service": self._spec.name,
            "model": self._spec.model.model_name,
            "fingerprint": self._model.fingerprint,
            "device": self._child_args.device or "auto",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "age_ms": round((time.monotonic() - self._began) * 1000),
            "running": len(self._progress.running()),
            "running_ms": round(self._progress.runner.idle_s * 1000),
            "past": self._child_args.past,
            "batch_tokens": self._context.window.budget.tokens,
            "text_tokens": _text_tokens(self._model),
            "threads": self._context.threads.count if self._on_cpu else 0,
            **self._context.counters.fields(),
            **self._context.figures(),
        }


def _text_tokens(model: Model) -> int:
    """Most tokens of a text; 0 if there is no limit, or none is known."""
    limit = model.limit.tokens if isinstance(model, Reads) else 0
    return 0 if limit >= ANY_LENGTH else limit
