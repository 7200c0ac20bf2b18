"""What `emit` promises, on any server."""

from __future__ import annotations

from contracts.queue import CALLER, Queue, draft, names

from millstream.broker.contract.job import Claim, Draft
from millstream.broker.contract.operations import OPERATIONS
from millstream.broker.contract.partial import Delta, Record, decode_delta, decode_records, encode_record, text_of
from millstream.broker.queue.stream_types import DIVERGED, LOST, Emission, Settlement
from millstream.broker.queue.streams import MOST_UNREAD_DELTAS, REPLY_TTL_MS

STREAMING = OPERATIONS["echo-stream"].op


def streaming(client: str = CALLER) -> Draft:
    return draft(client=client)._replace(op=STREAMING)


def emission(claim: Claim, before: bytes, *texts: str, forgives: bool = False) -> Emission:
    """The next pieces of a job of which the server has the records `before`."""
    offset = len(text_of(decode_records(before)))
    records = b"".join(encode_record(Record(text, b"state")) for text in texts)
    return Emission(claim.address, len(before), records, Delta(offset, "".join(texts)), forgives)


def deltas(queue: Queue, client: str = CALLER) -> list[Delta]:
    entries = queue.entries(queue.keys.reply(client))
    return [decode_delta(fields[b"delta"]) for _, fields in entries if b"delta" in fields]


def partial(queue: Queue, claim: Claim) -> bytes:
    (records,) = queue.streams.partials([claim.address.job_id])
    return records


def attempts(queue: Queue, consumer: str) -> list[float]:
    return [claim.attempts for claim in queue.claim(consumer).claims]


class EmitContract:
    """A subclass gives the fixture `queue`."""

    def test_records_are_kept_and_their_text_is_shown_at_its_offset(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())

        (first,) = queue.streams.emit("w1", [emission(claim, b"", "the ", "mïll ")])
        before = partial(queue, claim)
        (second,) = queue.streams.emit("w1", [emission(claim, before, "turns")])

        assert (first, second) == (len(before), len(partial(queue, claim)))
        assert [record.text for record in decode_records(partial(queue, claim))] == ["the ", "mïll ", "turns"]
        assert {record.state for record in decode_records(partial(queue, claim))} == {b"state"}
        assert deltas(queue) == [Delta(0, "the mïll "), Delta(9, "turns")]

    def test_many_jobs_are_emitted_in_one_call_each_by_itself(self, queue: Queue) -> None:
        mine, other, detached = queue.hold("w1", streaming(), streaming("other"), streaming(""))
        lost = mine._replace(address=mine.address._replace(name="2:1-1"))

        texts = {mine: "a", lost: "b", other: "c", detached: "d"}
        outcomes = queue.streams.emit("w1", [emission(claim, b"", text) for claim, text in texts.items()])

        assert outcomes[1] == LOST
        assert (deltas(queue), deltas(queue, "other")) == ([Delta(0, "a")], [Delta(0, "c")])
        assert text_of(decode_records(partial(queue, detached))) == "d"

    def test_the_same_call_again_changes_nothing(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        once = [emission(claim, b"", "a", "b")]

        assert queue.streams.emit("w1", once) == queue.streams.emit("w1", once)

        assert text_of(decode_records(partial(queue, claim))) == "ab"
        assert deltas(queue) == [Delta(0, "ab")]

    def test_a_call_whose_answer_was_lost_may_be_sent_again_with_more(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        queue.streams.emit("w1", [emission(claim, b"", "a")])

        queue.streams.emit("w1", [emission(claim, b"", "a", "b")])

        assert text_of(decode_records(partial(queue, claim))) == "ab"
        assert deltas(queue) == [Delta(0, "a"), Delta(0, "ab")]

    def test_only_the_holder_of_a_job_may_emit(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        queue.streams.emit("w1", [emission(claim, b"", "a")])
        queue.lease.release("w1", gone=True)
        (again,) = queue.claim("w2").claims
        before = partial(queue, again)

        assert queue.streams.emit("w1", [emission(claim, before, "stale")]) == [LOST]
        queue.streams.emit("w2", [emission(again, before, "b")])

        assert again.given_back
        assert text_of(decode_records(partial(queue, again))) == "ab"
        assert deltas(queue) == [Delta(0, "a"), Delta(1, "b")]

    def test_records_that_are_not_the_beginning_of_the_callers_are_not_appended_to(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        queue.streams.emit("w1", [emission(claim, b"", "a")])

        assert queue.streams.emit("w1", [emission(claim, b"", "x", "y")]) == [DIVERGED]

        assert text_of(decode_records(partial(queue, claim))) == "a"

    def test_a_server_that_lost_records_says_how_many_it_has(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        queue.streams.emit("w1", [emission(claim, b"", "a")])
        before = partial(queue, claim)
        queue.client.delete(queue.keys.partial(claim.address.job_id))

        assert queue.streams.emit("w1", [emission(claim, before, "b")]) == [0]

        assert partial(queue, claim) == b""

    def test_nothing_is_left_once_the_job_is_settled(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        queue.streams.emit("w1", [emission(claim, b"", "a")])

        assert queue.settle([claim]) == ["answered"]
        assert queue.streams.emit("w1", [emission(claim, b"", "a")]) == [LOST]

        assert not queue.client.exists(queue.keys.partial(claim.address.job_id))
        assert queue.replies_only() == [(claim.address.job_id, b"reply")]

    def test_a_late_twins_answer_leaves_the_successors_records(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        queue.streams.emit("w1", [emission(claim, b"", "a")])
        queue.lease.release("w1", gone=True)
        (again,) = queue.claim("w2").claims
        assert queue.settle([again]) == ["answered"]
        (other,) = queue.hold("w2", streaming())
        queue.streams.emit("w2", [emission(other, b"", "b")])

        assert queue.settle([claim]) == ["late"]

        assert text_of(decode_records(partial(queue, other))) == "b"

    def test_cancelling_purging_and_burying_delete_what_was_emitted(self, queue: Queue) -> None:
        cancelled, purged, buried = queue.hold("w1", streaming(), streaming(), streaming())
        queue.streams.emit("w1", [emission(each, b"", "a") for each in (cancelled, purged, buried)])
        queue.lease.release("w1", keep=names([buried]))

        assert queue.streams.cancel([cancelled.address.job_id], CALLER) == ["waiting"]
        assert queue.streams.purge() == 1
        assert queue.streams.settle([Settlement(buried.address, b"no", "max_attempts")]) == ["answered"]

        assert not queue.client.keys(queue.keys.partial("*"))

    def test_records_live_as_long_as_their_job_is_known(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming()._replace(deadline=None))
        queue.streams.emit("w1", [emission(claim, b"", "a")])
        job_id = claim.address.job_id

        ttls = [queue.client.pttl(queue.keys.partial(job_id)), queue.client.pttl(queue.keys.seen(job_id))]

        assert min(ttls) > 0
        assert abs(ttls[0] - ttls[1]) < 60_000

    def test_a_client_that_reads_slowly_gets_no_deltas_and_its_text_is_kept(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        for _ in range(MOST_UNREAD_DELTAS):
            queue.client.xadd(queue.keys.reply(CALLER), {"id": "x", "reply": "y"})
        queue.client.pexpire(queue.keys.reply(CALLER), REPLY_TTL_MS)

        (length,) = queue.streams.emit("w1", [emission(claim, b"", "a")])

        assert (deltas(queue), length) == ([], len(partial(queue, claim)))

    def test_deaths_are_forgiven_to_a_job_that_got_on(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())
        queue.lease.release("w1", started=names([claim]), gone=True, how="killed")
        (again,) = queue.claim("w2").claims
        assert again.attempts == 1.0

        queue.streams.emit("w2", [emission(again, b"", "a", forgives=True)])
        queue.lease.release("w2", started=names([again]), gone=True, how="killed")

        assert attempts(queue, "w3") == [0.5]

    def test_records_may_be_empty_of_text(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", streaming())

        queue.streams.emit("w1", [emission(claim, b"", "")])

        assert decode_records(partial(queue, claim)) == [Record("", b"state")]
        assert deltas(queue) == []
