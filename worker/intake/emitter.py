"""Thread: shows what running jobs generate to their clients, and keeps it for a worker that takes a job over.

Output of all jobs goes out together, once in EVERY_S while texts grow, up to LATER_S earlier if it has the first
word of a text, and at once if that text is realtime. It goes out from the last byte that the server confirmed: an
emission that failed or whose answer was lost is late, and nothing is emitted twice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from millstream.broker.contract.job import Address, Priority
from millstream.broker.contract.partial import MAX_PARTIAL_BYTES, Delta, Record, decode_records, encode_record, text_of
from millstream.broker.queue.lease import SUSPECT_ATTEMPTS
from millstream.broker.queue.stream_types import DIVERGED, LOST, Emission
from millstream.broker.queue.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, Streams
from millstream.broker.transport.connection import is_transient
from millstream.worker.context import Context
from millstream.worker.scheduling.active_job import ActiveJob

log = logging.getLogger(__name__)

EVERY_S = 0.05
"""Seconds from one emission to the next. A reader notices no delay below about 0.05 s."""

LATER_S = 0.03
"""Seconds of EVERY_S, and of AWAY_S, for which no first word of a text waits: its reader counts from the call."""

AWAY_S = 0.2
"""Seconds between two attempts while the server is away."""


@dataclass(slots=True)
class _Output:
    """Output of one job. `records` is all of it, encoded; the server has confirmed the first `confirmed` bytes.

    `offset`: code points of the confirmed text. `text`: the text behind it. `forgiven`: deaths of earlier workers do
    not count against the job any more. The first record of each run earns that: a job that kills its worker at one of
    its records is buried all the same, because its next runs begin there and die without a new record. `urgent`: its
    first record must not wait, since the job is realtime, or since such deaths count against it now, and nothing else
    runs before it has earned that.
    """

    address: Address
    records: bytearray
    confirmed: int
    offset: int
    text: list[str] = field(default_factory=list)
    urgent: bool = False
    forgiven: bool = False

    @classmethod
    def of(cls, job: ActiveJob) -> _Output:
        text = text_of(decode_records(job.records))
        address = job.claim.address
        urgent = job.claim.attempts >= SUSPECT_ATTEMPTS or address.priority is Priority.REALTIME
        return cls(address, bytearray(job.records), len(job.records), len(text), urgent=urgent)

    def add(self, record: Record) -> None:
        self.records += encode_record(record)
        self.text.append(record.text)

    def emission(self) -> Emission:
        delta = Delta(self.offset, "".join(self.text))
        pending = bytes(memoryview(self.records)[self.confirmed :])
        return Emission(self.address, self.confirmed, pending, delta, not self.forgiven)

    def confirm(self, emission: Emission, length: int) -> None:
        """Notes that the server has `length` bytes."""
        if length == emission.before + len(emission.records):
            # More may have been added meanwhile.
            self.offset += len(emission.delta.text)
            self.text = ["".join(self.text)[len(emission.delta.text) :]]
            self.forgiven = True
        else:
            # The server lost some: all behind `length` is sent again.
            whole = text_of(decode_records(bytes(self.records)))
            self.offset = len(text_of(decode_records(bytes(self.records[:length]))))
            self.text = [whole[self.offset :]]
        self.confirmed = length


_Emitted = tuple[_Output, Emission]


class Emitter(threading.Thread):
    """Emits what was `put`, until `stop`. `end_jobs` is called with the names of jobs that this worker lost."""

    def __init__(self, context: Context, streams: Streams, end_jobs: Callable[[Sequence[str]], object]) -> None:
        super().__init__(name="emitter", daemon=True)
        self._consumer = context.consumer
        self._window = context.window
        self._shutdown = context.shutdown
        self._streams = streams
        self._end_jobs = end_jobs
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Another condition, so that output that is put during a pause does not wake the thread.
        self._ended = threading.Condition(self._lock)
        self._confirmed = threading.Condition(self._lock)
        self._outputs: dict[str, _Output] = {}
        self._pending: dict[str, None] = {}
        self._is_urgent = False
        self._begun: set[str] = set()
        self._flushing: set[str] = set()
        self._stopped = False

    def put(self, job: ActiveJob, record: Record) -> None:
        """Adds output of a job. Called by the runner, and waits for nothing."""
        with self._lock:
            output = self._outputs.get(job.name)
            if output is None:
                output = self._outputs[job.name] = _Output.of(job)
            # If there is no more room, the reply has the rest, and a successor begins here.
            if has_room := len(output.records) < MAX_PARTIAL_BYTES:
                output.add(record)
                self._note_pending(job.name, output)
        if not has_room:
            # Others need not wait for what never comes.
            self._window.prove([job.name])

    def forget(self, names: Sequence[str]) -> None:
        """Emits no more of these jobs: they ended, and their replies have the whole output."""
        with self._lock:
            for name in names:
                self._outputs.pop(name, None)
                self._note_emitted(name)

    def flush(self, names: Sequence[str], timeout: float) -> bool:
        """Waits until the server has all output of these jobs; False after `timeout` seconds."""
        with self._lock:
            self._flushing.update(names)
            self._changed.notify()
            try:
                return self._confirmed.wait_for(lambda: self._pending.keys().isdisjoint(names), timeout)
            finally:
                self._flushing.difference_update(names)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._changed.notify()
            self._ended.notify()

    def run(self) -> None:
        with self._shutdown.guard():
            while self._wait():
                self._pause(self.emit())

    def _wait(self) -> bool:
        with self._lock:
            self._changed.wait_for(lambda: self._pending or self._stopped)
            return not self._stopped

    def _pause(self, seconds: float) -> None:
        with self._lock:
            # While the server is away, what is urgent waits, too.
            may_hurry = seconds <= EVERY_S
            self._ended.wait_for(lambda: self._stopped or (self._is_urgent and may_hurry), seconds - LATER_S)
            self._changed.wait_for(
                lambda: self._stopped or self._has_first or (self._is_urgent and may_hurry), min(seconds, LATER_S)
            )

    @property
    def _has_first(self) -> bool:
        """Whether the first output of a run is pending, or output for which `flush` waits."""
        return bool(self._begun) or not self._flushing.isdisjoint(self._pending)

    def emit(self) -> float:
        """Emits what is pending, as much as goes into one call. Returns the seconds to wait before the next call."""
        emissions = self._next()
        if not emissions:
            return EVERY_S
        try:
            lengths = self._streams.emit(self._consumer, [emission for _, emission in emissions.values()])
        except Exception as error:
            if not is_transient(error):
                raise
            log.debug("emit: %s", error)
            return AWAY_S
        lost, forgiven = self._confirm(emissions, lengths)
        if lost:
            self._end_jobs(lost)
        self._window.prove(forgiven)
        with self._lock:
            return EVERY_S if emissions.keys() >= self._pending.keys() else 0.0

    def _next(self) -> dict[str, _Emitted]:
        emissions: dict[str, _Emitted] = {}
        size = 0
        with self._lock:
            self._is_urgent = False
            for name in self._pending:
                if len(emissions) == MAX_JOBS_PER_CALL or size >= MAX_BYTES_PER_CALL:
                    break
                output = self._outputs[name]
                emissions[name] = output, output.emission()
                size += len(emissions[name][1].records)
        return emissions

    def _confirm(self, emissions: dict[str, _Emitted], lengths: Sequence[int]) -> tuple[list[str], list[str]]:
        """Notes what the server has. Returns the jobs that this worker lost, and those whose deaths are forgiven."""
        lost, forgiven = list[str](), list[str]()
        with self._lock:
            for (name, (output, emission)), length in zip(emissions.items(), lengths, strict=True):
                # The job may have been given back meanwhile, and claimed again: its next run has an output of its own.
                if self._outputs.get(name) is not output:
                    continue
                if length in (LOST, DIVERGED):
                    lost.append(name)
                    self._outputs.pop(name)
                    self._note_emitted(name)
                    if length == DIVERGED:
                        log.error("job %s: the server has other output of it than this worker", name)
                    continue
                output.confirm(emission, length)
                self._note_emitted(name)
                if output.forgiven:
                    forgiven.append(name)
                if output.confirmed < len(output.records):
                    # Behind the others: each gets its turn.
                    self._pending[name] = None
            self._confirmed.notify_all()
        return lost, forgiven

    def _note_pending(self, name: str, output: _Output) -> None:
        self._is_urgent |= output.urgent and not output.forgiven
        if not output.forgiven:
            self._begun.add(name)
        if not self._pending or self._begun:
            self._changed.notify()
        if self._is_urgent:
            self._ended.notify()
        self._pending[name] = None

    def _note_emitted(self, name: str) -> None:
        self._pending.pop(name, None)
        self._begun.discard(name)
