"""Shared jobs: if equal jobs are in flight at the same time, one is sent and the others get its answer.

The job that is sent is the leader; the jobs that wait for its answer are its followers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock, Thread

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import InvalidRequest, Malformed, MillstreamError, ModelFailed
from millstream.broker.queue.stream_types import CancelOutcome
from millstream.broker.queue.submission import Sink, Submission
from millstream.client.channel.channel import Channel
from millstream.client.channel.requests import Cancellation

log = logging.getLogger(__name__)

WATCH_S = 0.1
"""Seconds between two checks of shared jobs whose leader was cancelled: their deadline may be before a follower's."""

_FAILED = b'"error'
"""Bytes in the first line of a reply if the job or one of its rows failed."""

_INPUT_ERRORS = (InvalidRequest, ModelFailed)
"""Errors that the input causes: an equal job would get them too."""


@dataclass(slots=True, eq=False)
class _SharedJob:
    """Sink of a leader's job, with its followers by job id.

    `leader` is the sink of the caller whose job was sent; None if that caller has cancelled it and followers still
    wait. `end` is the job's deadline, monotonic seconds.
    """

    coalescer: Coalescer
    key: Hashable
    service: str
    job_id: str
    leader: Sink | None
    end: float | None
    followers: dict[str, Submission] = field(default_factory=dict)

    def answered(self, job_id: str, reply: bytes) -> None:
        followers = self.coalescer.end_shared(self, resend=not _is_shared(reply))
        sinks = [(job_id, self.leader)] if self.leader else []
        for each, sink in [*sinks, *((follower, submission.sink) for follower, submission in followers.items())]:
            try:
                sink.answered(each, reply)
            except Exception:
                # One caller's error must not keep the answer from the others.
                log.exception("job %s: its answer could not be handed over", each)

    def emitted(self, job_id: str, delta: bytes) -> None:
        sinks = [(job_id, self.leader)] if self.leader else []
        for each, sink in [*sinks, *self.coalescer.followers_of(self)]:
            try:
                sink.emitted(each, delta)
            except Exception:
                log.exception("job %s: a delta of its text could not be handed over", each)

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        self.coalescer.end_shared(self, resend=True)
        if self.leader:
            self.leader.refused(job_ids, error)

    def is_over(self, now: float) -> bool:
        return self.end is not None and now >= self.end


def _is_shared(reply: bytes) -> bool:
    """Returns whether followers get this reply: it is an answer, or an error that their own jobs would get too."""
    # Most replies are answers. This check saves decoding them a second time.
    if reply.find(_FAILED, 0, reply.find(b"\n")) < 0:
        return True
    try:
        decoded = decode_reply(reply)
    except Malformed:
        return True
    errors = [decoded.error] if decoded.error else decoded.errors.values()
    return all(isinstance(error, _INPUT_ERRORS) for error in errors)


class Coalescer:
    """Channel for services with a cache, in front of the real channel. Sends equal jobs once.

    The rate limit does not charge followers, as it does not charge cache hits. Each job keeps its own deadline.
    An error that may concern the leader alone (a deadline, a refusal, a lost worker) is not shared: all followers are
    then sent at once, each as a job of its own. If the leader's caller cancels, the job goes on for its followers.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.after_fork()

    def after_fork(self) -> None:
        """Forgets all shared jobs in a forked child: it does not inherit its parent's calls."""
        # Lock order: a handle's lock, then this one, then the channel's locks.
        self._lock = Lock()
        self._jobs: dict[Hashable, _SharedJob] = {}
        self._by_leader: dict[str, _SharedJob] = {}
        self._by_follower: dict[str, _SharedJob] = {}
        self._leaderless: set[_SharedJob] = set()
        self._watching = False

    @property
    def client_id(self) -> str:
        return self._channel.client_id

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Does as Channel.submit."""
        own = [leading for each in submissions if (leading := self._lead_or_follow(each))]
        if not own:
            return
        try:
            self._channel.submit(own)
        except BaseException:
            # An interrupt must not leave followers waiting for a job that was never sent.
            for each in own:
                if isinstance(each.sink, _SharedJob):
                    self.end_shared(each.sink, resend=True)
            raise

    def _lead_or_follow(self, submission: Submission) -> Submission | None:
        """Returns the submission to send; None if it follows an equal job that was sent.

        Its sink is a new shared job. A submission that cannot be shared is returned as it is.
        """
        # A caller that does not wait for room must not follow a job that does.
        if submission.jobs != 1 or submission.until == 0.0:
            return submission
        (draft,) = submission.group.drafts
        key = (submission.service, submission.group.priority, draft.op, draft.tenant, draft.body)
        with self._lock:
            shared_job = self._jobs.get(key)
            # After its deadline a shared job gets no followers: if its caller dropped the call, no answer may come.
            if shared_job and not shared_job.is_over(time.monotonic()):
                shared_job.followers[draft.id] = submission
                self._by_follower[draft.id] = shared_job
                return None
            own_job = _SharedJob(self, key, submission.service, draft.id, submission.sink, draft.deadline)
            self._jobs[key] = self._by_leader[draft.id] = own_job
            return submission._replace(sink=own_job)

    def followers_of(self, shared_job: _SharedJob) -> list[tuple[str, Sink]]:
        """Returns the job ids and sinks of its followers."""
        with self._lock:
            return [(job_id, submission.sink) for job_id, submission in shared_job.followers.items()]

    def end_shared(self, shared_job: _SharedJob, *, resend: bool) -> dict[str, Submission]:
        """Ends the shared job. Returns its followers the first time; with `resend` sends them and returns none."""
        with self._lock:
            followers = self._end_shared(shared_job)
            if resend and followers:
                self._send(list(followers.values()))
                return {}
        return followers

    def _end_shared(self, shared_job: _SharedJob) -> dict[str, Submission]:
        if self._jobs.get(shared_job.key) is shared_job:
            del self._jobs[shared_job.key]
        self._by_leader.pop(shared_job.job_id, None)
        self._leaderless.discard(shared_job)
        followers, shared_job.followers = shared_job.followers, {}
        for job_id in followers:
            del self._by_follower[job_id]
        return followers

    def _send(self, submissions: Sequence[Submission]) -> None:
        """Submits former followers in one call: if sent one after another, each would wait for the ones before it.

        Runs under the lock: the cancellation of a job must not reach the channel before the job.
        """
        try:
            self._channel.submit(submissions)
        except MillstreamError as error:
            # In a thread: the caller that ends the shared job may hold the lock of another call.
            Thread(target=_refuse, args=(submissions, error), daemon=True).start()

    def cancel(self, cancellation: Cancellation) -> None:
        """Does as Channel.cancel. A leader with followers goes on for them; a follower was never sent."""
        known: dict[str, CancelOutcome] = {}
        server_ids: dict[str, str] = {}
        with self._lock:
            for job_id in cancellation.job_ids:
                if outcome := self._leave_shared(job_id):
                    known[job_id] = outcome
                else:
                    server_ids[job_id] = self._end_for(job_id)
        self._cancel(cancellation, known, server_ids)

    def _leave_shared(self, job_id: str) -> CancelOutcome | None:
        """Removes the caller from a shared job that others wait for.

        Returns the outcome of the cancellation; None if the job has to be cancelled on the server.
        """
        if shared_job := self._by_follower.get(job_id):
            if shared_job.leader is None and len(shared_job.followers) == 1:
                return None
            del shared_job.followers[job_id], self._by_follower[job_id]
            return "waiting"
        if (
            (shared_job := self._by_leader.get(job_id))
            and shared_job.followers
            and not shared_job.is_over(time.monotonic())
        ):
            shared_job.leader = None
            self._watch(shared_job)
            return "running"
        return None

    def _end_for(self, job_id: str) -> str:
        """Ends the shared job that `job_id` follows, if any. Returns the id under which the server knows the job."""
        if shared_job := self._by_follower.get(job_id):
            self._end_shared(shared_job)
            return shared_job.job_id
        return job_id

    def _cancel(self, cancellation: Cancellation, known: dict[str, CancelOutcome], server_ids: dict[str, str]) -> None:
        def report(outcomes: Sequence[CancelOutcome] | MillstreamError) -> None:
            if not isinstance(outcomes, MillstreamError):
                found = known | dict(zip(server_ids, outcomes, strict=True))
                outcomes = [found[job_id] for job_id in cancellation.job_ids]
            cancellation.report(outcomes)

        if not server_ids:
            report([])
            return
        try:
            self._channel.cancel(Cancellation(cancellation.service, list(server_ids.values()), report))
        finally:
            # A client that is being closed reaches this, too: only this call tells the followers.
            for job_id in server_ids:
                if shared_job := self._by_leader.get(job_id):
                    self.end_shared(shared_job, resend=True)

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Does as Channel.refusal_of. A follower waits for what its leader waits for."""
        shared_job = self._by_follower.get(job_id)
        return self._channel.refusal_of(shared_job.job_id if shared_job else job_id)

    # -- shared jobs without a leader --------------------------------------------------------------------------

    def _watch(self, shared_job: _SharedJob) -> None:
        if shared_job.end is None:
            return
        self._leaderless.add(shared_job)
        # If no thread can start, each follower's own deadline ends its wait.
        with suppress(RuntimeError):
            if not self._watching:
                Thread(target=self._watch_all, name="millstream-coalescing", daemon=True).start()
                self._watching = True

    def _watch_all(self) -> None:
        """Runs in a thread while there are shared jobs without a leader. Ends each one at its deadline."""
        while self._give_up_late():
            time.sleep(WATCH_S)

    def _give_up_late(self) -> bool:
        """Ends shared jobs whose deadline is over; returns False if there are no others to watch."""
        with self._lock:
            now = time.monotonic()
            late = [shared_job for shared_job in self._leaderless if shared_job.is_over(now)]
            self._watching = len(late) < len(self._leaderless)
            watching = self._watching
            for shared_job in late:
                self._send(list(self._end_shared(shared_job).values()))
        with suppress(MillstreamError):
            for shared_job in late:
                self._channel.cancel(Cancellation(shared_job.service, [shared_job.job_id], lambda outcomes: None))
        return watching


def _refuse(submissions: Sequence[Submission], error: MillstreamError) -> None:
    for submission in submissions:
        submission.sink.refused(submission.job_ids, error)
