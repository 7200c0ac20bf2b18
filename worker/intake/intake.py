"""From claimed entries to rows: who can run, who gets an error at once. Decides; does no I/O beside the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.contract.codec import decode_inputs
from millstream.broker.contract.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Malformed,
    MillstreamError,
    ModelFailed,
    UnsupportedVersion,
    WorkerLost,
    described,
)
from millstream.broker.contract.job import Claim, Job, Json, Reply
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import Model, Prepared
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.supervision.progress import Progress, Stage, Track


@dataclass(frozen=True, slots=True)
class _Request:
    """A job whose body was read; `place` is its claim's among those admitted together, from 1."""

    place: int
    claim: Claim
    job: Job
    inputs: list[Json]
    options: Mapping[str, Json]


Digests = Callable[[Sequence[Json], Mapping[str, Json]], Sequence[str]]
"""The names under which the answers of rows are kept, from inputs and options; none where none are kept."""


class Intake:
    """Turns one claim's entries into jobs with prepared rows; the rest is finished at once, each by its own error.

    `track` tells the supervisor what is being read and prepared.
    """

    def __init__(
        self,
        model: Model,
        max_attempts: int,
        digests: Digests = lambda inputs, options: (),
        track: Track | None = None,
    ) -> None:
        self._model = model
        self._digests = digests
        self._track = track or Progress.alone().claimer
        self._places: Iterator[int] = iter(())
        self.max_attempts = max_attempts

    def admit(self, claims: Sequence[Claim], now: int) -> tuple[list[ActiveJob], list[Finished]]:
        """The jobs to run and the answers to settle, at `now`, server ms.

        Until `end_admission` the death of the process is charged to these claims, also after an error in here: the
        process ends by it, and they may be its cause.
        """
        self._track.start([claim.address.name for claim in claims], Stage.CLAIM)
        requests: list[_Request] = []
        finished: list[Finished] = []
        for place, claim in enumerate(claims, 1):
            read = self._read(place, claim, now)
            if isinstance(read, Finished):
                finished.append(read)
            else:
                requests.append(read)
        jobs = self._prepare(requests)
        finished += [Finished(each.claim.address, each.reply()) for each in jobs if not each.rows_left]
        return [each for each in jobs if each.rows_left], finished

    def end_admission(self) -> None:
        """Note that others hold what was admitted last: its rows in the window, its answers to settle."""
        self._track.stop()

    def lap(self) -> None:
        """Note that the model turns to its next row. Called by a model that prepares row by row, before each."""
        self._track.point(next(self._places, 0))

    def _read(self, place: int, claim: Claim, now: int) -> _Request | Finished:
        job = claim.job
        if job is None:
            return _newer(claim) if claim.newer else _malformed(claim, claim.malformed)
        if claim.attempts >= self.max_attempts:
            lost = WorkerLost(
                f"its worker died {claim.attempts:g} times while it had it in work", hint="see the dead letters"
            )
            return Finished(claim.address, Reply(error=lost), bury="max_attempts")
        if phase := job.missed(now):
            return Finished(claim.address, Reply(error=expired(job, phase, now)))
        if job.op != self._model.op:
            wrong = InvalidRequest(f"this service runs {self._model.op!r}, the job asks for {job.op!r}")
            return Finished(claim.address, Reply(error=wrong))
        try:
            inputs, options = decode_inputs(job.body, job.rows)
        except Malformed as error:
            return _malformed(claim, str(error))
        return _Request(place, claim, job, inputs, options)

    def _prepare(self, requests: Sequence[_Request]) -> list[ActiveJob]:
        """Prepare all rows that share their options in one call: one tokenizer call a claim, not one a job."""
        groups: dict[str, list[_Request]] = {}
        for request in requests:
            key = json.dumps(request.options, sort_keys=True) if request.options else ""
            groups.setdefault(key, []).append(request)
        jobs = []
        for group in groups.values():
            inputs = [each for request in group for each in request.inputs]
            places = [request.place for request in group for _ in request.inputs]
            rows = iter(self._rows(inputs, group[0].options, places))
            jobs += [ActiveJob(each.claim, each.job, [next(rows) for _ in each.inputs]) for each in group]
            for job, request in zip(jobs[-len(group) :], group, strict=True):
                job.digests = self._digests(request.inputs, request.options)
        self._track.move(Stage.PREPARE)
        return jobs

    def _rows(
        self, inputs: Sequence[Json], options: Mapping[str, Json], places: Sequence[int]
    ) -> list[Prepared | MillstreamError]:
        """The inputs as rows; `places` are those of their entries. Each part has the whole stall timeout."""
        self._track.move(Stage.PREPARE)
        self._places = iter(places)
        try:
            rows = self._model.prepare(inputs, options)
            if len(rows) != len(inputs):
                raise ModelFailed(f"prepare gave {len(rows)} rows for {len(inputs)} inputs")
        except BaseException as error:  # noqa: BLE001 - a tokenizer's panic is no Exception, and its neighbours must live
            if len(inputs) == 1:
                return [ModelFailed(f"cannot be prepared: {described(error)}")]
            half = len(inputs) // 2
            first = self._rows(inputs[:half], options, places[:half])
            return first + self._rows(inputs[half:], options, places[half:])
        return rows


def _malformed(claim: Claim, reason: str) -> Finished:
    error = InvalidRequest(f"the entry is malformed: {reason}", hint="it was not written by a millstream client")
    return Finished(claim.address, Reply(error=error), bury=f"malformed: {reason}")


def _newer(claim: Claim) -> Finished:
    """The answer to an entry that only newer workers read. Its copy can be run again when they are there."""
    error = UnsupportedVersion(f"it was written by a newer client: {claim.malformed}", hint="update the workers")
    return Finished(claim.address, Reply(error=error), bury=f"newer version: {claim.malformed}")


def expired(job: Job, phase: str, now: int) -> DeadlineExceeded:
    """The error of a job whose `phase` was over at `now`, server ms, before it started."""
    return DeadlineExceeded(f"not started within its {phase} time: it waited {now - job.at} ms", phase=phase)


def cancelled(job: ActiveJob) -> Finished:
    """The answer to a job that its caller does not want any more."""
    return Finished(job.claim.address, Reply(error=Cancelled("cancelled by its caller")))
