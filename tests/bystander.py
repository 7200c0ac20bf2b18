"""A service whose only worker is the test itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from contracts.queue import Queue
from support import eventually

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.codec import decode_inputs, encode_reply
from millstream.broker.contract.job import Claim, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Settlement
from millstream.broker.transport.connection import Connection


class Bystander:
    """Claims and answers when the test wants it."""

    def __init__(self, connection: Connection, registered: ServiceSpec) -> None:
        self._registry, self._spec = Registry(connection), registered
        self._registry.push([registered])
        self.name = registered.name
        self.queue = Queue(connection.client, ServiceKeys(registered.name))

    def live(self) -> None:
        """Beat: from now on the service has a worker."""
        self.queue.lease.beat("bystander", {}, [])

    @contextmanager
    def living(self) -> Iterator[None]:
        """Beat as workers do: however long it takes, the service has a worker meanwhile."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(0.5):
                self.live()

        self.live()
        beating = threading.Thread(target=beat)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()

    def claim(self, count: int) -> list[Claim]:
        """Exactly `count` jobs, as soon as they are there."""
        claims: list[Claim] = []

        def claimed() -> bool:
            claims.extend(self.queue.claim("bystander", rows=100_000, tokens=10**9).claims)
            return len(claims) >= count

        eventually(claimed)
        assert len(claims) == count
        return claims

    def push(self, **changes: object) -> None:
        """Register the service anew, with `changes`."""
        self._registry.push([self._spec.model_copy(update=changes)], replace=True)

    def claim_one(self) -> Claim:
        """The oldest job that waits, alone."""
        claims: list[Claim] = []

        def claimed() -> bool:
            claims.extend(self.queue.claim("bystander", jobs=1).claims)
            return bool(claims)

        eventually(claimed)
        return claims[0]

    def answer(self, *claims: Claim) -> None:
        """Echo."""
        for claim in claims:
            assert claim.job is not None
            inputs, _ = decode_inputs(claim.job.body, claim.job.rows)
            self.settle(claim, Reply(values=inputs))

    def answer_all(self, claims: Sequence[Claim]) -> None:
        """The same in few calls, for jobs of one row."""
        for at in range(0, len(claims), 128):
            page = claims[at : at + 128]
            jobs = [claim.job for claim in page if claim.job]
            replies = [encode_reply(Reply(values=decode_inputs(job.body, job.rows)[0])) for job in jobs]
            settlements = [Settlement(claim.address, reply) for claim, reply in zip(page, replies, strict=True)]
            assert set(self.queue.streams.settle(settlements)) == {"answered"}

    def settle(self, claim: Claim, reply: Reply) -> None:
        assert self.queue.streams.settle([Settlement(claim.address, encode_reply(reply))]) == ["answered"]
