"""Streams of text in any order of events, beside a model that says what must be true.

Workers emit, repeat calls whose answer they did not hear, die, take over from the last record, and settle; late calls
of workers that lost a job arrive; callers read, read slowly, cancel; an operator purges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from contracts.emit import STREAMING, emission
from contracts.queue import Queue, draft
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millstream.broker.contract.job import Claim
from millstream.broker.contract.partial import Delta, decode_delta, decode_records, text_of
from millstream.broker.queue.stream_types import LOST, Emission, Settlement

T = TypeVar("T")

WORKERS = ("w1", "w2")
CLIENTS = ("alice", "bob", "")
"""The last one is nobody: its jobs are detached."""

pieces = st.lists(st.text("aä", min_size=0, max_size=3), min_size=1, max_size=3).map(lambda texts: [*texts, "b"])


@dataclass
class Text:
    """One job, as the model knows it."""

    client: str
    records: list[str] = field(default_factory=list)
    holder: str = ""
    ended: bool = False
    seen: str = ""
    """Text that its client has put together from deltas."""

    @property
    def text(self) -> str:
        return "".join(self.records)


@dataclass
class Run:
    """One worker's run of one job. `before`: encoded records that it knows the server has; `pending`: texts behind."""

    claim: Claim
    before: bytes
    pending: list[str] = field(default_factory=list)
    last: Emission | None = None


def pick(data: st.DataObject, choices: Sequence[T]) -> T:
    """One of them, by its place: ids are other ones in each run."""
    return choices[data.draw(st.integers(0, len(choices) - 1))]


class EmitMachine(RuleBasedStateMachine):
    """Real scripts on a server of any kind, two workers, two clients and nobody, against the model."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.queue = queue
        self.jobs: dict[str, Text] = {}
        self.runs: dict[str, dict[str, Run]] = {worker: {} for worker in WORKERS}
        self.stale: list[tuple[str, Run]] = []

    @initialize()
    def begin(self) -> None:
        """Most examples are short: begin with what all other rules need."""
        for client in CLIENTS:
            self.enqueue(client)
        self.claim(WORKERS[0])

    @rule(client=st.sampled_from(CLIENTS))
    def enqueue(self, client: str) -> None:
        (job,) = self.queue.put(draft(client=client)._replace(op=STREAMING))
        self.jobs[job.id] = Text(client)

    @rule(worker=st.sampled_from(WORKERS))
    def claim(self, worker: str) -> None:
        claims = self.queue.claim(worker, jobs=2).claims
        records = self.queue.streams.partials([claim.address.job_id for claim in claims]) if claims else []
        for claim, before in zip(claims, records, strict=True):
            job = self.jobs[claim.address.job_id]
            assert text_of(decode_records(before)) == job.text
            assert claim.given_back or not before
            job.holder = worker
            self.runs[worker][claim.address.job_id] = Run(claim, before)

    @rule(worker=st.sampled_from(WORKERS), texts=pieces, heard=st.booleans(), data=st.data())
    def emit(self, worker: str, texts: list[str], heard: bool, data: st.DataObject) -> None:
        if not self.runs[worker]:
            return
        run = self.runs[worker][pick(data, list(self.runs[worker]))]
        job = self.jobs[run.claim.address.job_id]
        run.pending += texts
        run.last = emission(run.claim, run.before, *run.pending)
        (length,) = self.queue.streams.emit(worker, [run.last])
        job.records += texts
        assert length == run.last.before + len(run.last.records)
        if heard:
            run.before, run.pending = run.before + run.last.records, []

    @rule(worker=st.sampled_from(WORKERS), data=st.data())
    def emit_the_same_again(self, worker: str, data: st.DataObject) -> None:
        again = [run for run in self.runs[worker].values() if run.last]
        if again:
            run = pick(data, again)
            assert run.last
            self.queue.streams.emit(worker, [run.last])

    @precondition(lambda self: self.stale)
    @rule(texts=pieces, data=st.data())
    def emit_by_who_lost_the_job(self, texts: list[str], data: st.DataObject) -> None:
        worker, run = pick(data, self.stale)
        if self.jobs[run.claim.address.job_id].holder != worker:
            assert self.queue.streams.emit(worker, [emission(run.claim, run.before, *texts)]) == [LOST]

    @rule(worker=st.sampled_from(WORKERS))
    def die(self, worker: str) -> None:
        self.queue.lease.release(worker, gone=True)
        for job_id, run in self.runs[worker].items():
            self.jobs[job_id].holder = ""
            self.stale.append((worker, run))
        self.runs[worker].clear()

    @rule(worker=st.sampled_from(WORKERS), data=st.data())
    def settle(self, worker: str, data: st.DataObject) -> None:
        if not self.runs[worker]:
            return
        run = self.runs[worker].pop(pick(data, list(self.runs[worker])))
        job = self.jobs[run.claim.address.job_id]
        assert self.queue.streams.settle([Settlement(run.claim.address, job.text.encode())]) == ["answered"]
        job.ended, job.holder = True, ""
        self.stale.append((worker, run))

    @precondition(lambda self: any(not job.ended for job in self.jobs.values()))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = pick(data, [each for each, job in self.jobs.items() if not job.ended])
        job = self.jobs[job_id]
        (outcome,) = self.queue.streams.cancel([job_id], job.client)
        assert outcome == ("running" if job.holder else "waiting")
        job.ended = job.ended or not job.holder

    @rule()
    def purge(self) -> None:
        waiting = [job for job in self.jobs.values() if not (job.ended or job.holder)]
        assert self.queue.streams.purge() == len(waiting)
        for job in waiting:
            job.ended = True

    @rule(client=st.sampled_from(CLIENTS[:2]), most=st.integers(1, 5))
    def read(self, client: str, most: int) -> None:
        for entry, fields in self.queue.entries(self.queue.keys.reply(client))[:most]:
            job_id = fields[b"id"].decode()
            if b"delta" in fields:
                self.see(job_id, decode_delta(fields[b"delta"]))
            self.queue.client.xdel(self.queue.keys.reply(client), entry)

    def see(self, job_id: str, delta: Delta) -> None:
        """As a client does: drop what it has, and read the records once if it missed something."""
        job = self.jobs[job_id]
        if delta.offset > len(job.seen):
            (records,) = self.queue.streams.partials([job_id])
            text = text_of(decode_records(records))
            job.seen = max(job.seen, text, key=len)
        elif delta.offset + len(delta.text) > len(job.seen):
            job.seen = job.seen[: delta.offset] + delta.text

    @invariant()
    def the_server_has_what_was_emitted(self) -> None:
        live = [job_id for job_id, job in self.jobs.items() if not job.ended]
        for job_id, records in zip(live, self.queue.streams.partials(live) if live else [], strict=True):
            assert text_of(decode_records(records)) == self.jobs[job_id].text

    @invariant()
    def nothing_is_left_of_ended_jobs(self) -> None:
        ended = [self.queue.keys.partial(job_id) for job_id, job in self.jobs.items() if job.ended]
        assert not (ended and self.queue.client.exists(*ended))

    @invariant()
    def a_client_sees_a_part_from_the_start_nothing_twice_and_nothing_else(self) -> None:
        for job in self.jobs.values():
            assert job.text.startswith(job.seen)
