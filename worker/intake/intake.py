"""Turns claimed entries into prepared rows, or into errors. Calls the model's tokenizer; does no other I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

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
from millstream.broker.contract.partial import decode_records
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import Generates, Model, Prepared
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.supervision.progress import Progress, Stage, Track


@dataclass(frozen=True, slots=True)
class _Request:
    """A job with its decoded inputs. `place`: position of its claim among those admitted together, from 1."""

    place: int
    claim: Claim
    job: Job
    inputs: list[Json]
    options: Mapping[str, Json]


NO_RECORDS: Mapping[str, bytes] = MappingProxyType({})

Digests = Callable[[Sequence[Json], Mapping[str, Json]], Sequence[str]]
"""Computes the cache keys of rows from inputs and options; empty if there is no cache."""


class Intake:
    """Turns the entries of a claim into jobs with prepared rows. Each entry that cannot run is finished with an error.

    `resumes`: jobs may go on behind output of earlier runs. `digests` may change; None if answers are not cached.
    `track` shows the supervisor which entries are being read and prepared.
    """

    def __init__(
        self,
        model: Model,
        max_attempts: int,
        digests: Digests | None = None,
        track: Track | None = None,
    ) -> None:
        self._model = model
        self._generates = model if isinstance(model, Generates) else None
        self.resumes = self._generates is not None
        self.digests = digests
        self._track = track or Progress.alone().claimer
        self._places: Iterator[int] = iter(())
        self.max_attempts = max_attempts

    def admit(
        self, claims: Sequence[Claim], now: int, records: Mapping[str, bytes] = NO_RECORDS
    ) -> tuple[list[ActiveJob], list[Finished]]:
        """Returns the jobs to run and the answers to settle, at `now`, server ms.

        `records`: encoded output of earlier runs, by the names of their jobs, which go on behind it.
        The death of the process is charged to these claims until `end_admission`. That holds also if this raises: the
        error ends the process, and one of the claims may be its cause.
        """
        self._track.start([claim.address.name for claim in claims], Stage.CLAIM)
        requests: list[_Request] = []
        finished: list[Finished] = []
        for place, claim in enumerate(claims, 1):
            read = self._read(place, claim, now, has_begun=claim.address.name in records)
            if isinstance(read, Finished):
                finished.append(read)
            else:
                requests.append(read)
        jobs = self._prepare(requests)
        if self._generates:
            for job in jobs:
                self._begin(self._generates, job, records.get(job.name, b""))
        finished += [Finished(each.claim.address, each.reply(), run=each) for each in jobs if not each.rows_left]
        return [each for each in jobs if each.rows_left], finished

    def end_admission(self) -> None:
        """Notes that the last admitted jobs are in the window and their errors with the settler."""
        self._track.stop()

    def lap(self) -> None:
        """Notes that the model begins the next row. A model that prepares row by row calls it before each."""
        self._track.point(next(self._places, 0))

    def _read(self, place: int, claim: Claim, now: int, *, has_begun: bool) -> _Request | Finished:
        job = claim.job
        if job is None:
            return _newer(claim) if claim.newer else _malformed(claim, claim.malformed)
        if claim.attempts >= self.max_attempts:
            lost = WorkerLost(
                f"its worker died {claim.attempts:g} times while it worked on this job", hint="see the dead letters"
            )
            return Finished(claim.address, Reply(error=lost), bury="max_attempts", run=claim)
        # Queue time ended with the first output, on any worker. If the deadline is over, the caller gets that output.
        if (phase := job.missed(now)) and not has_begun:
            return Finished(claim.address, Reply(error=expired(job, phase, now)), run=claim)
        if job.op != self._model.op:
            wrong = InvalidRequest(f"this service runs {self._model.op!r}, the job asks for {job.op!r}")
            return Finished(claim.address, Reply(error=wrong), run=claim)
        try:
            inputs, options = decode_inputs(job.body, job.rows)
        except Malformed as error:
            return _malformed(claim, str(error))
        if len(inputs) != 1 and self._generates:
            wrong = InvalidRequest(f"a job of {job.op!r} has one row, not {len(inputs)}", hint="update the client")
            return Finished(claim.address, Reply(error=wrong), run=claim)
        return _Request(place, claim, job, inputs, options)

    @staticmethod
    def _begin(model: Generates, job: ActiveJob, blob: bytes) -> None:
        """Makes a job go on behind its output so far, if it has some; its row fails if the model cannot."""
        row = job.prepared[0]
        if isinstance(row, MillstreamError):
            return
        try:
            model.begin(row, job.request.id, decode_records(blob))
            job.records = blob
        except Exception as error:  # noqa: BLE001 - whatever it raises is this job's error
            job.outcomes[0], job.rows_left = ModelFailed(f"cannot go on with its output: {described(error)}"), 0

    def _prepare(self, requests: Sequence[_Request]) -> list[ActiveJob]:
        """Prepares all rows with equal options in one call, so that a claim usually takes one tokenizer call."""
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
                if self.digests:
                    job.digests = self.digests(request.inputs, request.options)
        self._track.move(Stage.PREPARE)
        return jobs

    def _rows(
        self, inputs: Sequence[Json], options: Mapping[str, Json], places: Sequence[int]
    ) -> list[Prepared | MillstreamError]:
        """Prepares the inputs, halving them if that fails; `places` are those of their entries.

        Each call has the whole stall timeout.
        """
        self._track.move(Stage.PREPARE)
        self._places = iter(places)
        try:
            rows = self._model.prepare(inputs, options)
            if len(rows) != len(inputs):
                raise ModelFailed(f"prepare gave {len(rows)} rows for {len(inputs)} inputs")
        except BaseException as error:  # noqa: BLE001 - a tokenizer's panic is no Exception, and must not fail others
            if len(inputs) == 1:
                return [ModelFailed(f"cannot be prepared: {described(error)}")]
            half = len(inputs) // 2
            first = self._rows(inputs[:half], options, places[:half])
            return first + self._rows(inputs[half:], options, places[half:])
        return rows


def _malformed(claim: Claim, reason: str) -> Finished:
    error = InvalidRequest(f"the entry is malformed: {reason}", hint="it was not written by a millstream client")
    return Finished(claim.address, Reply(error=error), bury=f"malformed: {reason}", run=claim)


def _newer(claim: Claim) -> Finished:
    """The answer to an entry that only newer workers can read. Its dead letter can be run again by them."""
    error = UnsupportedVersion(f"it was written by a newer client: {claim.malformed}", hint="update the workers")
    return Finished(claim.address, Reply(error=error), bury=f"newer version: {claim.malformed}", run=claim)


def expired(job: Job, phase: str, now: int) -> DeadlineExceeded:
    """The error of a job that did not start before its `phase` was over; `now`: server ms."""
    return DeadlineExceeded(f"not started within its {phase} time: it waited {now - job.at} ms", phase=phase)


def cancelled(job: ActiveJob) -> Finished:
    """The answer to a job that its caller cancelled."""
    return Finished(job.claim.address, Reply(error=Cancelled("cancelled by its caller")), run=job)
