"""Thread that encodes answers and settles them, many jobs a round trip. Keeps them while the server is away."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from millstream.broker.contract.codec import encode_reply, origin_of
from millstream.broker.contract.errors import CODES, Malformed, MillstreamError, ModelFailed
from millstream.broker.contract.generation import Usage, read_usage
from millstream.broker.contract.job import Address, Claim, Reply
from millstream.broker.contract.stages import Stages
from millstream.broker.queue.stream_types import Settlement
from millstream.broker.queue.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, Streams
from millstream.broker.transport.connection import retrying
from millstream.telemetry.worker_traces import WorkerTraces
from millstream.worker.context import Context
from millstream.worker.job_spans import job_of
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.supervision.progress import Stage

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A job's answer, ready to settle. `bury`: reason for the dead letters, "" if the job does not go there.

    `digests`: cache key of each row's answer; empty if they are not cached. `run`: the job, or its claim if it was not
    prepared.
    """

    address: Address
    reply: Reply
    bury: str = ""
    digests: Sequence[str] = ()
    run: ActiveJob | Claim | None = None

    def stages(self, worker: str, now: int) -> Stages | None:
        """The stages of its run, which `worker` settles at `now`, server ms."""
        run = self.run
        if isinstance(run, Claim):
            enqueued = run.job.at if run.job else 0
            return Stages(worker, run.attempts, 0, enqueued, run.at, settled=now)
        return run.stages(worker, now) if run else None


class CacheWriter(Protocol):
    """Writes answers to a cache."""

    def encoded(self, finished: Finished) -> list[tuple[str, bytes]]:
        """Cache keys and encoded answers of one job."""

    def write(self, answers: Sequence[tuple[str, bytes]]) -> None:
        """Writes answers to the cache; may wait for the server."""


class Settler(threading.Thread):
    """Settles the answers that were `put`, until `finish`. None is dropped while the process lives."""

    def __init__(
        self,
        context: Context,
        streams: Streams,
        cache_writer: CacheWriter | None = None,
        fingerprint: str = "",
    ) -> None:
        super().__init__(name="settler", daemon=True)
        self._origin = origin_of(fingerprint)
        self._consumer = context.consumer
        self._clock = context.clock
        self._traces = context.traces
        self._streams = streams
        self._cache_writer = cache_writer
        self._window = context.window
        self._counters = context.counters
        self._histograms = context.histograms
        self._shutdown = context.shutdown
        self._track = context.progress.settler
        self._stage = context.stage
        self._queue: queue.SimpleQueue[Finished | None] = queue.SimpleQueue()
        self._overflow: list[Finished] = []
        self._ended = False

    def put(self, finished: Finished) -> None:
        self._queue.put(finished)

    def finish(self) -> None:
        """Settles the answers that were put so far, then ends."""
        self._queue.put(None)

    def run(self) -> None:
        with self._shutdown.guard():
            while ready := self._next():
                self._settle(ready)

    def _next(self) -> list[Finished]:
        """Waits for answers to settle: the overflow of the last call, then new ones. Empty after `finish`."""
        ready, self._overflow = self._overflow, []
        while not self._ended and len(ready) < MAX_JOBS_PER_CALL and not (ready and self._queue.empty()):
            finished = self._queue.get()
            if finished is None:
                self._ended = True
            else:
                ready.append(finished)
        return ready

    def _settle(self, ready: list[Finished]) -> None:
        batch, answers = self._encode(ready)
        self._overflow = ready[len(batch) :]
        # Before the reply: a caller that has this answer and asks again then finds it in the cache.
        if answers and self._cache_writer:
            self._cache_writer.write(answers)
        self._write(ready, batch)

    def _encode(self, ready: Sequence[Finished]) -> tuple[list[Settlement], list[tuple[str, bytes]]]:
        """Encodes as many answers as fit one call. Returns the settlements, and the answers to cache.

        The stage ends before the writes, which may wait for the server: a death during them is charged to no job.
        """
        names = [each.address.name for each in ready]
        # None is the usual case, kept fast: the process has one lane.
        if self._stage is None:
            return self._encode_all(names, ready)
        with self._stage(self._window.has_suspect(names)):
            return self._encode_all(names, ready)

    def _encode_all(
        self, names: Sequence[str], ready: Sequence[Finished]
    ) -> tuple[list[Settlement], list[tuple[str, bytes]]]:
        self._track.start(names, Stage.SETTLE)
        batch: list[Settlement] = []
        answers: list[tuple[str, bytes]] = []
        size = 0
        for place, finished in enumerate(ready, 1):
            if size >= MAX_BYTES_PER_CALL:
                break
            self._track.point(place)
            batch.append(self._encode_one(finished))
            if self._traces:
                self._trace(self._traces, finished)
            size += len(batch[-1].reply)
            if finished.digests and self._cache_writer:
                answers += self._cache_writer.encoded(finished)
        self._track.stop()
        return batch, answers

    def _encode_one(self, finished: Finished) -> Settlement:
        answer = finished.reply
        try:
            # Only results of detached calls stay on the server, so that `job trace` can read the stages.
            if finished.address.call:
                answer = answer._replace(stages=finished.stages(self._consumer, self._clock.now()))
            encoded = encode_reply(answer, self._origin)
        except BaseException as error:  # noqa: BLE001 - a result may have code of its own, and must not fail other jobs
            answer = Reply(error=ModelFailed(f"the answer cannot be sent: {type(error).__name__}"))
            encoded = encode_reply(answer)
        # The usual case, kept fast: no row has an error.
        if answer.error is None and not answer.errors:
            return Settlement(finished.address, encoded, finished.bury)
        return Settlement(finished.address, encoded, finished.bury, _failed(answer, finished.address.rows))

    def _trace(self, traces: WorkerTraces, finished: Finished) -> None:
        now = self._clock.now()
        if job := job_of(finished.run, finished.reply, finished.stages(self._consumer, now), time.time() * 1000 - now):
            traces.record_job(job)

    def _write(self, ready: Sequence[Finished], batch: list[Settlement]) -> None:
        """Settles the first ones of `ready`, encoded in `batch`."""
        # Settling is idempotent, so the call is sent again after a cut connection.
        outcomes = retrying(lambda: self._streams.settle(batch), until=None, stop=None)
        answered = []
        for finished, outcome in zip(ready, outcomes, strict=False):
            if outcome == "late":
                self._counters.late += 1
            elif outcome == "unwritable":
                log.error("job %s: its reply could not be written; it is among the dead letters", finished.address)
            else:
                answered.append(finished)
        self._count(answered)
        self._window.forget([settlement.address.name for settlement in batch])

    def _count(self, answered: Sequence[Finished]) -> None:
        """Counts jobs that were answered now. It runs for every job, so it makes no call for each."""
        now, tokens, waiting = self._clock.now(), 0, self._histograms.answers()
        for finished in answered:
            address, reply = finished.address, finished.reply
            tokens += reply.tokens
            # A job that never ran has no times.
            if timings := reply.timings:
                times = waiting[address.name[0]]
                times += (timings["queue"], now - address.at, timings["inference"])
            if address.streams:
                self._count_text(reply)
        self._counters.jobs += len(answered)
        self._counters.tokens_in += tokens

    def _count_text(self, reply: Reply) -> None:
        if usage := _usage(reply):
            self._counters.tokens_out += usage.completion
            self._counters.tokens_reused += usage.cached


def _usage(reply: Reply) -> Usage | None:
    """Returns the tokens of a generated text; None if the reply does not say."""
    value = reply.values[0] if reply.values else None
    try:
        return read_usage(value.get("usage")) if isinstance(value, dict) else None
    except Malformed:
        return None


def _failed(reply: Reply, rows: int) -> Mapping[str, int]:
    """Returns the number of rows with an error, by its code. A code is a class's: their number is limited."""
    return {_code(reply.error): rows} if reply.error else Counter(map(_code, reply.errors.values()))


def _code(error: MillstreamError) -> str:
    return error.code if error.code in CODES else MillstreamError.code
