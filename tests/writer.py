"""A worker of a service that streams, which writes what the test wants, when it wants."""

from __future__ import annotations

from contracts.emit import emission
from contracts.queue import Queue
from support import eventually

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.codec import decode_inputs, encode_reply
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.generation import Generation
from millstream.broker.contract.job import Claim, Json, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.partial import Delta, decode_records, encode_delta, text_of
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Settled, Settlement
from millstream.broker.transport.connection import Connection


def register(connection: Connection, name: str, **runtime: object) -> None:
    """A service that streams; its type is echo-stream, or `kind`."""
    model = ModelSpec.model_validate({"type": runtime.pop("kind", "echo-stream"), "model_name": "m"})
    settings = Runtime.model_validate(runtime)
    Registry(connection).push([ServiceSpec(name=name, model=model, model_ref="m", runtime=settings)])


class Writer:
    """Holds one job at a time, from `take` to `settle`."""

    def __init__(self, connection: Connection, service: str, consumer: str = "w1") -> None:
        self.queue = Queue(connection.client, ServiceKeys(service))
        self.consumer = consumer
        self._claim: Claim | None = None
        self._before = b""

    @property
    def claim(self) -> Claim:
        assert self._claim
        return self._claim

    @property
    def text(self) -> str:
        """What was written so far."""
        return text_of(decode_records(self._before))

    def live(self) -> list[str]:
        """Beats; the entries that were cancelled."""
        held = [self._claim.address.name] if self._claim else []
        return self.queue.lease.beat(self.consumer, {}, held).cancelled

    def take(self) -> tuple[list[Json], dict[str, Json]]:
        """Claims the next job, and goes on behind its last record. Its rows and options."""
        self.live()
        claims: list[Claim] = []

        def claimed() -> bool:
            claims.extend(self.queue.claim(self.consumer, jobs=1).claims)
            return bool(claims)

        eventually(claimed)
        (self._claim,) = claims
        (self._before,) = self.queue.streams.partials([self.claim.address.job_id])
        job = self.claim.job
        assert job
        return decode_inputs(job.body, job.rows)

    def write(self, *texts: str, shown: bool = True) -> None:
        """Emits them in one call. `shown` False: the client gets no delta, as if it was lost."""
        each = emission(self.claim, self._before, *texts)
        each = each if shown else each._replace(delta=Delta(0, ""))
        assert self.queue.streams.emit(self.consumer, [each]) == [each.before + len(each.records)]
        self._before += each.records

    def show(self, offset: int, text: str) -> None:
        """A delta whose text the server does not have."""
        assert self.claim.job
        key = self.queue.keys.reply(self.claim.job.client)
        delta = encode_delta(Delta(offset, text))
        self.queue.client.xadd(key, {"id": self.claim.address.job_id, "delta": delta})
        self.queue.client.pexpire(key, 60_000)

    def lose(self) -> None:
        """The worker dies, and its job is given back."""
        self.queue.lease.release(self.consumer, gone=True)

    def settle(self, text: str | None = None, reason: str = "stop") -> Settled:
        """Ends the job with all that was written, or with `text`."""
        result = Generation(self.text if text is None else text, reason)
        return self.answer(Reply(values=[result.json()], tokens=7))

    def fail(self, error: MillstreamError) -> Settled:
        return self.answer(Reply(error=error))

    def answer(self, reply: Reply) -> Settled:
        (settled,) = self.queue.streams.settle([Settlement(self.claim.address, encode_reply(reply))])
        return settled
