"""A call keeps to its window, puts answers where their rows were, and ends with one outcome a row."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.codec import decode_inputs, encode_reply, origin_of
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    Malformed,
    MillstreamError,
    MixedModels,
    ModelFailed,
    NoWorkers,
    PartialFailure,
    QueueFull,
    RateLimited,
    WorkerLost,
)
from millstream.broker.contract.job import Draft, Json, Priority, Reply
from millstream.broker.contract.partial import Delta
from millstream.broker.queue.submission import Submission
from millstream.client import handle as handle_module
from millstream.client.channel.channel import Channel
from millstream.client.channel.requests import Cancellation
from millstream.client.channel.wake_chain import wake_chain
from millstream.client.flow import JOBS_PER_WORKER
from millstream.client.growing_text import GrowingText
from millstream.client.handle import Handle
from millstream.client.job_terms import JobTerms, Progress
from millstream.client.known import Known
from millstream.client.result import Embeddings, Values
from millstream.client.split import split
from millstream.client.streaming import TextCall, TextStream
from millstream.client.testing import FakeClient
from millstream.client.transfer import CONCLUDE_S, EXPLAIN_S, Transfer


class FakeChannel:
    """Keeps what was submitted until the test answers it."""

    client_id = "caller"

    def __init__(self) -> None:
        self.waiting: list[Draft] = []
        self.submissions: list[Submission] = []
        self.forgotten: list[str] = []
        self.cancelled: list[str] = []
        self.most = 0
        self.closed = False

    def submit(self, submissions: Sequence[Submission]) -> None:
        if self.closed:
            raise BrokerUnavailable("this client is closed")
        self.submissions += submissions
        self.waiting += [draft for submission in submissions for draft in submission.group.drafts]
        self.most = max(self.most, len(self.waiting))

    def forget(self, service: str, job_ids: Sequence[str]) -> None:
        self.forgotten += job_ids

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        return None

    def cancel(self, cancellation: Cancellation) -> None:
        self.cancelled += cancellation.job_ids

    def take(self, at: int = 0) -> tuple[Draft, list[Json]]:
        """One of the jobs under way, and its rows."""
        draft = self.waiting.pop(at)
        inputs, _ = decode_inputs(draft.body, draft.rows)
        return draft, inputs


SPEC = ServiceSpec(name="echo", model=ModelSpec(type="echo"), model_ref="echo", runtime=Runtime())


class FakeWatch:
    """A service with as many live workers as it says; says at once why a call is late."""

    def __init__(self, live_workers: int = 0) -> None:
        self.live_workers = live_workers
        self.silent = False

    def live(self, service: str, changed: Callable[[], None]) -> int:
        self.changed = changed
        return max(1, self.live_workers)

    def explain(self, service: str, tell: Callable[[Known], None]) -> None:
        if not self.silent:
            tell(self.last_known(service))

    def last_known(self, service: str) -> Known:
        return Known(SPEC, "", self.live_workers, False, 0.0)


def terms(
    *,
    window: int = 4,
    timeout: float | None = None,
    total_timeout: float | None = None,
    wait: bool = True,
    op: str = "echo",
) -> JobTerms:
    return JobTerms("echo", op, Priority.NORMAL, {}, timeout, total_timeout, None, wait, window)


def call(
    channel: FakeChannel,
    inputs: Sequence[Json],
    given_terms: JobTerms | None = None,
    *,
    rows_a_job: int = 2,
    refused: Mapping[int, MillstreamError] | None = None,
    watch: FakeWatch | None = None,
) -> Handle:
    refused = refused or {}
    sizes = {row: len(str(text)) for row, text in enumerate(inputs) if row not in refused}
    parts = split(sizes, rows_a_job, 10_000)
    return Handle(
        Transfer(cast(Channel, channel), watch or FakeWatch(), given_terms or terms(), inputs, parts, refused)
    )


def echo_all(channel: FakeChannel, handle: Handle, chance: random.Random) -> None:
    while channel.waiting:
        draft, inputs = channel.take(chance.randrange(len(channel.waiting)))
        handle._transfer.answered(draft.id, encode_reply(Reply(values=inputs)))


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=40)


@given(texts, st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_order_is_restored_and_the_window_kept_whatever_order_answers_come_in(
    rows: list[str], window: int, rows_a_job: int, chance: random.Random
) -> None:
    channel = FakeChannel()
    handle = call(channel, rows, terms(window=window), rows_a_job=rows_a_job)

    echo_all(channel, handle, chance)

    assert handle.result(0) == rows
    assert channel.most <= window
    assert sum(submission.group.drafts[0].rows for submission in channel.submissions) == len(rows)


def test_vectors_are_stacked_in_the_order_of_the_texts_and_what_they_cost_is_added_up() -> None:
    channel = FakeChannel()
    handle = call(channel, ["1", "22", "3", "44", "5"])

    while channel.waiting:
        draft, inputs = channel.take(-1)
        vectors = np.array([[float(str(text)), 0.5] for text in inputs], dtype=np.float32)
        reply = Reply(vectors=vectors, tokens=3, truncated=(0,), timings={"queue": float(draft.rows)})
        handle._transfer.answered(draft.id, encode_reply(reply))

    result = handle.result(0)
    assert isinstance(result, Embeddings)
    assert result[:, 0].tolist() == [1, 22, 3, 44, 5]
    assert result.usage == {"tokens": 9}
    assert len(result.truncated) == 3
    assert result.timings["queue"] == 2.0


def test_a_call_of_one_job_has_the_jobs_id() -> None:
    channel = FakeChannel()

    handle = call(channel, ["a"])

    assert [draft.id for draft in channel.waiting] == [handle.id]


def test_failures_are_told_by_row_beside_the_results_of_the_others() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c", "d", 5], refused={4: InvalidRequest("no string")})

    first, _ = channel.take()
    handle._transfer.answered(first.id, encode_reply(Reply(values=["A"], errors={1: ModelFailed("NaN")})))
    second, _ = channel.take()
    handle._transfer.answered(second.id, encode_reply(Reply(error=DeadlineExceeded("late", phase="inference"))))

    with pytest.raises(PartialFailure) as caught:
        handle.result(0)
    assert {row: type(error) for row, error in caught.value.errors.items()} == {
        1: ModelFailed,
        2: DeadlineExceeded,
        3: DeadlineExceeded,
        4: InvalidRequest,
    }
    assert caught.value.results == ["A", None, None, None, None]


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"not a reply\n",
        encode_reply(Reply(values=["only one"])),
        encode_reply(Reply()),
        encode_reply(Reply(values=["a", "b", "c"])),
        encode_reply(Reply(vectors=np.ones((3, 2), np.float32))),
        encode_reply(Reply(vectors=np.ones((1, 2), np.float32))),
        encode_reply(Reply(values=["a", "b"], errors={1: ModelFailed("no")})),
        encode_reply(Reply(values=["a"], errors={2: ModelFailed("no")})),
        b'{"v":1,"shape":[-1,2]}\n' + b"\0" * 16,
        b'{"v":1,"shape":[2,4611686018427387904]}\n' + b"\0" * 16,
        b'{"v":1,"values":["a",NaN]}\n',
        b'{"v":1,"values":["a",1e999]}\n',
        b'{"v":2,"values":["a","b"]}\n',
        encode_reply(Reply(vectors=np.ones((2, 2), np.float32), error=ModelFailed("no"))),
    ],
)
def test_a_reply_that_does_not_fit_its_job_answers_no_row_of_it(reply: bytes) -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"])

    handle._transfer.answered(channel.take()[0].id, reply)

    with pytest.raises(ModelFailed):
        handle.result(0)
    assert [type(outcome) for outcome in handle.outcomes(0)] == [ModelFailed, ModelFailed]


def test_a_row_that_was_not_there_cannot_have_been_cut() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"])

    handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(values=["a", "b"], truncated=(7,))))

    result = handle.result(0)
    assert isinstance(result, Values)
    assert (result, result.truncated) == (["a", "b"], ())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_its_rows_error_and_no_other_rows(
    dtype: type[np.float32 | np.float16], bad: float
) -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"])
    vectors = np.ones((2, 3), dtype)
    vectors[1, 2] = bad

    handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(vectors=vectors)))

    good, failed = handle.outcomes(0)
    assert isinstance(good, np.ndarray)
    assert isinstance(failed, ModelFailed)
    with pytest.raises(PartialFailure):
        handle.result(0)


def test_numbers_that_are_large_or_bits_are_a_vector() -> None:
    for vectors in (np.full((1, 3), 3e38, np.float32), np.full((1, 3), 255, np.uint8)):
        channel = FakeChannel()
        handle = call(channel, ["a"])

        handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(vectors=vectors)))

        np.testing.assert_array_equal(cast(Embeddings, handle.result(0)), vectors)


@pytest.mark.parametrize(
    "reply", [*(Reply(values=[value]) for value in ("0.5", True, None)), Reply(vectors=np.ones((1, 3), np.float32))]
)
def test_a_score_that_is_no_number_is_the_models_failure(reply: Reply) -> None:
    channel = FakeChannel()
    handle = call(channel, ["a"], terms(op="rerank"))

    handle._transfer.answered(channel.take()[0].id, encode_reply(reply))

    with pytest.raises(ModelFailed, match="score"):
        handle.result(0)


def test_sparse_vectors_and_scores_are_results() -> None:
    for op, values in (("embed", [{"indices": [1], "values": [0.5]}]), ("rerank", [3])):
        channel = FakeChannel()
        handle = call(channel, ["a"], terms(op=op))

        handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(values=cast(list[Json], values))))

        assert handle.result(0) == values


def test_dense_and_sparse_vectors_are_not_mixed_in_one_answer() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(op="embed"), rows_a_job=1)

    handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(values=[{"indices": [], "values": []}])))
    handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(vectors=np.ones((1, 3), np.float32))))

    with pytest.raises(ModelFailed, match="sparse"):
        handle.result(0)


def answered_by(*fingerprints: str) -> Handle:
    channel = FakeChannel()
    handle = call(channel, [str(each) for each in range(len(fingerprints))], rows_a_job=1)
    for fingerprint in fingerprints:
        draft, _ = channel.take()
        handle._transfer.answered(draft.id, encode_reply(Reply(np.ones((1, 3), np.float32)), origin_of(fingerprint)))
    return handle


def test_a_result_names_the_weights_that_made_all_of_it() -> None:
    result = answered_by("w1", "w1").result(0)

    assert isinstance(result, Embeddings)
    assert result.fingerprint == result[0].fingerprint == "w1"
    # A worker of an older version does not say.
    older = answered_by("w1", "").result(0)
    assert isinstance(older, Embeddings)
    assert older.fingerprint == ""


@pytest.mark.parametrize("fingerprints", [("w1", "w2"), ("", "w1", "w2"), ("w1", "w1", "w2")])
def test_the_answers_of_two_models_are_not_mixed_in_one_call(fingerprints: tuple[str, ...]) -> None:
    handle = answered_by(*fingerprints)

    with pytest.raises(MixedModels, match="w1, w2"):
        handle.result(0)
    assert all(isinstance(outcome, np.ndarray) for outcome in handle.outcomes(0))


def test_a_failure_has_no_weights_that_could_differ() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], rows_a_job=1)

    handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(error=WorkerLost("died")), origin_of("w1")))
    handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(values=["b"]), origin_of("w2")))

    with pytest.raises(PartialFailure):
        handle.result(0)


def test_vectors_of_different_lengths_are_the_models_failure() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c"])

    for dim in (2, 3):
        draft, inputs = channel.take()
        handle._transfer.answered(draft.id, encode_reply(Reply(vectors=np.ones((len(inputs), dim), dtype=np.float32))))

    with pytest.raises(ModelFailed):
        handle.result(0)


def test_an_answer_that_comes_twice_counts_once() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c"])
    draft, inputs = channel.take()

    handle._transfer.answered(draft.id, encode_reply(Reply(values=inputs)))
    handle._transfer.answered(draft.id, encode_reply(Reply(values=["other", "other"])))

    assert not handle.done()
    echo_all(channel, handle, random.Random(1))
    assert handle.result(0) == ["a", "b", "c"]


def test_without_patience_what_the_window_holds_is_one_submission_accepted_whole_or_not() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c", "d", "e"], terms(wait=False))

    (submission,) = channel.submissions
    assert (len(submission.group.drafts), submission.until) == (3, 0.0)
    handle._transfer.refused([draft.id for draft in submission.group.drafts], QueueFull("full", retry_after=0.1))

    with pytest.raises(QueueFull) as caught:
        handle.result(0)
    assert caught.value.retry_after == 0.1


def test_a_refusal_ends_what_was_not_sent_yet() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c"], terms(window=1), rows_a_job=1)

    handle._transfer.refused([channel.take()[0].id], BrokerUnavailable("away"))

    assert channel.waiting == []
    with pytest.raises(BrokerUnavailable):
        handle.result(0)


def test_a_call_on_a_closed_channel_fails() -> None:
    channel = FakeChannel()
    channel.closed = True

    handle = call(channel, ["a"])

    with pytest.raises(BrokerUnavailable):
        handle.result(0)


def test_a_channel_closed_between_two_jobs_fails_the_rest() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(window=1), rows_a_job=1)
    draft, inputs = channel.take()
    channel.closed = True

    handle._transfer.answered(draft.id, encode_reply(Reply(values=inputs)))

    with pytest.raises(PartialFailure):
        handle.result(0)


def test_at_the_end_of_its_time_a_call_asks_why_and_waits_no_more() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(window=1, timeout=1e-9), rows_a_job=1)

    with pytest.raises(NoWorkers):
        handle.result()

    assert channel.cancelled == [channel.waiting[0].id]


def test_a_text_that_has_begun_has_a_moment_beyond_its_timeout_for_its_reply() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a"], terms(timeout=0.05, op="stream"))
    (job_id,) = [draft.id for draft in channel.waiting]
    end = handle.expires_at
    handle._transfer.emitted(job_id, b"0 the text ")

    later = handle.expires_at

    assert end
    assert later == pytest.approx(end + CONCLUDE_S)
    time.sleep(0.06)
    handle.expire()
    assert not handle.ready


def test_one_wait_may_be_shorter_than_the_call() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a"], terms(timeout=60))

    with pytest.raises(DeadlineExceeded):
        handle.result(0.001)
    assert not handle.done()
    echo_all(channel, handle, random.Random(1))

    assert handle.done()
    assert handle.result() == ["a"]


def test_without_a_timeout_each_job_has_the_services_total_from_when_it_is_sent() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(window=1, total_timeout=60), rows_a_job=1)
    first = channel.waiting[0]

    echo_all(channel, handle, random.Random(1))

    first_end, second_end = (submission.until for submission in channel.submissions)
    assert first_end is not None
    assert second_end is not None
    assert first.deadline == first_end < second_end


def test_with_a_timeout_every_job_ends_with_the_call() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(window=1, timeout=60, total_timeout=1), rows_a_job=1)

    echo_all(channel, handle, random.Random(1))

    assert len({submission.until for submission in channel.submissions}) == 1


def test_a_call_whose_end_was_interrupted_is_over_all_the_same() -> None:
    class Interrupted(FakeWatch):
        def explain(self, service: str, tell: Callable[[Known], None]) -> None:
            raise KeyboardInterrupt

    handle = call(FakeChannel(), ["a", "b"], terms(window=1, timeout=1e-9), rows_a_job=1, watch=Interrupted())

    with pytest.raises(KeyboardInterrupt):
        handle.result()
    with pytest.raises(NoWorkers):
        handle.result()


class SlowChannel(FakeChannel):
    """Lets nobody through until its gate opens, and keeps the order in which it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.told: list[str] = []

    def submit(self, submissions: Sequence[Submission]) -> None:
        self.entered.set()
        self.gate.wait(10)
        super().submit(submissions)
        self.told += [f"submit {job_id}" for submission in submissions for job_id in submission.job_ids]

    def cancel(self, cancellation: Cancellation) -> None:
        self.told += [f"cancel {job_id}" for job_id in cancellation.job_ids]


def test_a_cancellation_does_not_overtake_what_another_thread_is_sending() -> None:
    channel = SlowChannel()
    handle = call(channel, ["a", "b"], terms(window=1), rows_a_job=1)
    draft, inputs = channel.take()
    channel.gate.clear()
    channel.entered.clear()
    sending = threading.Thread(target=lambda: handle._transfer.answered(draft.id, encode_reply(Reply(values=inputs))))
    cancelling = threading.Thread(target=handle.cancel_soon)

    sending.start()
    assert channel.entered.wait(10)
    cancelling.start()
    cancelling.join(0.05)
    channel.gate.set()
    sending.join(10)
    cancelling.join(10)

    second = channel.submissions[-1].job_ids[0]
    assert channel.told[-2:] == [f"submit {second}", f"cancel {second}"]


def test_an_endless_wait_is_one() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a"], terms(timeout=float("inf")))
    draft, inputs = channel.take()
    answering = threading.Timer(0.02, lambda: handle._transfer.answered(draft.id, encode_reply(Reply(values=inputs))))
    answering.start()

    assert handle.result(timeout=float("inf")) == ["a"]
    answering.join()


def waiting(handles: Sequence[Handle]) -> list[threading.Thread]:
    """A thread for each call, which sleeps until that is over."""
    threads = [threading.Thread(target=handle.result, daemon=True) for handle in handles]
    for thread in threads:
        thread.start()
    eventually(lambda: all(handle._transfer.waiters for handle in handles))
    return threads


def answer(channel: FakeChannel, handle: Handle) -> None:
    draft, inputs = channel.take()
    handle._transfer.answered(draft.id, encode_reply(Reply(values=inputs)))


def test_every_thread_whose_call_was_answered_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    # None of them looks for itself.
    monkeypatch.setattr(handle_module, "RECHECK_S", 60.0)
    channel = FakeChannel()
    handles = [call(channel, ["a"]) for _ in range(16)]
    threads = waiting(handles)

    for handle in handles:
        answer(channel, handle)

    eventually(lambda: not any(thread.is_alive() for thread in threads))
    assert not wake_chain.due


def test_a_thread_that_missed_its_wake_up_looks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_module, "RECHECK_S", 0.05)
    monkeypatch.setattr(wake_chain, "wake", lambda waiters: None)
    channel = FakeChannel()
    handle = call(channel, ["a"])
    (thread,) = waiting([handle])

    answer(channel, handle)
    thread.join(10.0)

    assert not thread.is_alive()


def test_an_error_made_for_a_missing_row_is_made_anew() -> None:
    """One that is raised again and again would keep alive whatever its callers held."""
    errors = []
    for _ in range(2):
        channel = FakeChannel()
        handle = call(channel, ["a"])
        handle._transfer.answered(channel.take()[0].id, encode_reply(Reply(values=[])))
        with pytest.raises(ModelFailed) as caught:
            handle.result(0)
        errors.append(caught.value)

    assert errors[0] is not errors[1]


def test_a_forked_child_goes_on_with_names_of_its_own() -> None:
    script = (
        "import os\n"
        "from millstream.client.job_terms import new_job_id\n"
        "new_job_id()\n"
        "read, write = os.pipe()\n"
        "if not os.fork():\n"
        "    os.write(write, new_job_id().encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(os.read(read, 64).decode() != new_job_id())\n"
    )

    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert said.stdout == "True\n"


def expired() -> bytes:
    return encode_reply(Reply(error=DeadlineExceeded("not started in time", phase="total")))


def test_what_the_caller_does_to_its_list_later_does_not_travel() -> None:
    channel, rows = FakeChannel(), ["a", "b", "c"]
    handle = call(channel, cast(list[Json], rows), terms(window=1), rows_a_job=1)
    rows.clear()

    echo_all(channel, handle, random.Random(1))

    assert handle.result(0) == ["a", "b", "c"]


def test_what_the_caller_does_to_its_options_later_does_not_travel() -> None:
    fake = FakeClient(handlers={})
    words = ["stop"]
    handle = fake.submit("embed", ["a"], words=cast(Json, words))

    words.append("changed")

    assert handle._transfer._terms.options == {"words": ["stop"]}


def test_a_part_that_cannot_be_sent_has_its_own_error() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", cast(Json, {"no", "json"}), "c"], rows_a_job=1)

    echo_all(channel, handle, random.Random(1))

    a, bad, c = handle.outcomes(0)
    assert (a, c) == ("a", "c")
    assert isinstance(bad, InvalidRequest)


def test_a_job_whose_time_is_over_goes_on_with_its_call_while_that_is_answered() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(total_timeout=60), rows_a_job=1)
    answer(channel, handle)
    late, _ = channel.take()

    handle._transfer.answered(late.id, expired())

    (again,) = channel.waiting
    assert again.id != late.id
    echo_all(channel, handle, random.Random(1))
    assert handle.result(0) == ["a", "b"]


def test_a_job_whose_time_is_over_fails_alone_if_nothing_else_was_answered() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c"], terms(window=1, total_timeout=60), rows_a_job=1)
    late, _ = channel.take()

    handle._transfer.answered(late.id, expired())
    echo_all(channel, handle, random.Random(1))

    first, *others = handle.outcomes(0)
    assert isinstance(first, DeadlineExceeded)
    assert others == ["b", "c"]


def test_a_job_that_found_no_room_in_its_time_is_sent_again_while_its_call_is_answered() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(total_timeout=60), rows_a_job=1)
    answer(channel, handle)
    late, _ = channel.take()

    handle._transfer.refused([late.id], QueueFull("full"))
    echo_all(channel, handle, random.Random(1))

    assert handle.result(0) == ["a", "b"]


def test_a_call_with_a_timeout_of_its_own_is_not_given_more() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(timeout=60), rows_a_job=1)
    answer(channel, handle)
    late, _ = channel.take()

    handle._transfer.answered(late.id, expired())

    assert channel.waiting == []
    with pytest.raises(PartialFailure):
        handle.result(0)


def test_a_call_that_is_answered_nothing_for_its_total_time_ends() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(window=1, total_timeout=0.05), rows_a_job=1)

    with pytest.raises(NoWorkers):
        handle.result()

    assert channel.cancelled == [channel.waiting[0].id]


def test_a_call_without_a_limit_ends_when_nobody_is_there_to_answer_it() -> None:
    endless = terms()._replace(idle_timeout=0.02)
    idle = call(FakeChannel(), ["a"], endless, watch=FakeWatch(live_workers=0))
    served = call(FakeChannel(), ["a"], endless, watch=FakeWatch(live_workers=1))

    with pytest.raises(NoWorkers):
        idle.result()
    assert not served.wait(0.1)


def test_calls_of_one_map_share_their_progress() -> None:
    channel, progress = FakeChannel(), Progress()
    limits = terms(total_timeout=0.2)
    first, second = (
        Handle(Transfer(channel, FakeWatch(1), limits, ["a"], split({0: 1}, 1, 100), {}, progress=progress))
        for _ in range(2)
    )

    progress.at += 60.0

    assert not second.wait(0.4)
    assert not first.wait(0)


def test_a_call_that_is_late_asks_without_waiting_and_ends_though_nobody_says_why() -> None:
    watch = FakeWatch()
    watch.silent = True
    handle = call(FakeChannel(), ["a"], terms(timeout=0.01), watch=watch)
    began = time.monotonic()

    with pytest.raises(NoWorkers):
        handle.result()

    assert time.monotonic() - began < 0.01 + EXPLAIN_S + 0.5


def test_a_late_call_whose_job_was_never_accepted_says_why() -> None:
    class Full(FakeChannel):
        def refusal_of(self, job_id: str) -> MillstreamError | None:
            return QueueFull("full", retry_after=0.1)

    handle = call(Full(), ["a", "b", "c"], terms(window=1, timeout=0.01), rows_a_job=1)

    with pytest.raises(QueueFull):
        handle.result()


def test_a_call_that_does_not_wait_waits_for_room_later_neither() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b"], terms(window=1, wait=False), rows_a_job=1)

    answer(channel, handle)

    assert [submission.until for submission in channel.submissions] == [0.0, 0.0]


def test_a_worker_that_joins_in_the_middle_of_a_call_gets_jobs_of_it() -> None:
    channel, watch = FakeChannel(), FakeWatch(live_workers=1)
    rows = [f"{n}" for n in range(100)]
    call(channel, cast(list[Json], rows), terms(window=128), rows_a_job=1, watch=watch)
    assert len(channel.waiting) == JOBS_PER_WORKER

    watch.live_workers = 3
    watch.changed()

    assert len(channel.waiting) == 3 * JOBS_PER_WORKER


def test_an_interrupt_while_a_call_begins_leaves_nothing_running() -> None:
    class Interrupted(FakeChannel):
        def submit(self, submissions: Sequence[Submission]) -> None:
            super().submit(submissions)
            raise KeyboardInterrupt

    channel = Interrupted()

    with pytest.raises(KeyboardInterrupt):
        call(channel, ["a"])

    assert channel.cancelled == [channel.waiting[0].id]


def test_a_call_is_charged_until_its_first_job_is_accepted() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c"], terms(total_timeout=60), rows_a_job=1)
    charged, _ = channel.take()
    answer(channel, handle)

    handle._transfer.refused([charged.id], RateLimited("limited"))

    assert [submission.group.calls for submission in channel.submissions] == [1, 0, 0, 1]
    assert channel.submissions[-1].group.refusals == 1


def test_the_later_jobs_of_a_call_that_is_refused_are_taken_back() -> None:
    channel = FakeChannel()
    handle = call(channel, ["a", "b", "c"], terms(timeout=60), rows_a_job=1)
    charged, *others = [draft.id for draft in channel.waiting]

    handle._transfer.refused([charged], RateLimited("limited"))

    assert channel.cancelled == others
    with pytest.raises(RateLimited):
        handle.result(0)


def test_a_job_is_either_lost_or_sent_again_though_its_map_moves_on_meanwhile() -> None:
    class Moving(Progress):
        """Another call of the map is answered between any two looks."""

        looks = 0

        @property
        def at(self) -> float:
            self.looks += 1
            return time.monotonic() + 60.0 if self.looks > 2 else 0.0

        @at.setter
        def at(self, value: float) -> None: ...

    channel, progress = FakeChannel(), Moving()
    parts = split({0: 1}, 1, 100)
    handle = Handle(Transfer(channel, FakeWatch(1), terms(total_timeout=60), ["a"], parts, {}, progress=progress))
    progress.looks = 0

    for _ in range(3):
        while channel.waiting:
            handle._transfer.refused([channel.take()[0].id], DeadlineExceeded("late"))
        if handle._rows.missing <= 0:
            break

    assert handle._rows.missing == 0


def streaming(channel: FakeChannel, given_terms: JobTerms, progress: Progress | None = None) -> TextCall:
    growing, parts = GrowingText(), split({0: 1}, 1, 100)
    watch = FakeWatch(1)
    return TextCall(
        Handle(Transfer(channel, watch, given_terms, ["a"], parts, {}, progress=progress, growing=growing)), growing
    )


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_job_whose_text_grows_has_the_calls_deadline_and_no_other(timeout: float | None) -> None:
    channel = FakeChannel()

    streaming(channel, terms(op="generate", timeout=timeout, total_timeout=1.0))

    assert (channel.waiting[0].deadline is None) == (timeout is None)


@pytest.mark.parametrize("ends", ["answered", "refused"])
def test_a_job_whose_text_has_begun_is_not_sent_again_though_the_call_made_progress(ends: str) -> None:
    channel = FakeChannel()
    call = streaming(channel, terms(op="generate", total_timeout=60))
    draft, _ = channel.take()
    transfer = call.handle._transfer

    transfer.emitted(draft.id, b"0 ab")
    if ends == "answered":
        transfer.answered(draft.id, encode_reply(Reply(error=DeadlineExceeded("late"))))
    else:
        transfer.refused([draft.id], DeadlineExceeded("late"))

    assert call.advance() == "ab"
    with pytest.raises(DeadlineExceeded):
        call.advance()
    assert channel.waiting == []


def test_a_delta_is_progress_and_those_of_other_jobs_are_not() -> None:
    channel = FakeChannel()
    call = streaming(channel, terms(op="generate", total_timeout=60))
    draft, _ = channel.take()
    first = call.handle.expires_at

    call.handle._transfer.emitted("another", b"0 x")
    second = call.handle.expires_at
    call.handle._transfer.emitted(draft.id, b"0 x")
    third = call.handle.expires_at

    assert first is not None
    assert second is not None
    assert third is not None
    assert first == second < third


def test_a_delta_that_cannot_be_read_is_progress_and_the_reply_has_its_text() -> None:
    channel = FakeChannel()
    call = streaming(channel, terms(op="generate"))
    draft, _ = channel.take()

    with pytest.raises(Malformed):
        call.handle._transfer.emitted(draft.id, b"no offset")
    value: Json = {"text": "ab", "finish_reason": "stop"}
    call.handle._transfer.answered(draft.id, encode_reply(Reply(values=[value])))

    assert (call.advance(), call.advance(), call.finish_reason) == ("ab", None, "stop")


def test_in_a_forked_child_a_stream_is_its_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = FakeChannel()
    call = streaming(channel, terms(op="generate"))
    call.handle._transfer.emitted(channel.waiting[0].id, b"0 ab")
    stream = TextStream(call, lambda call: Delta(0, ""))
    monkeypatch.setattr(call.handle, "_pid", -1)

    with pytest.raises(BrokerUnavailable, match="fork"):
        next(stream)
    stream.close()

    assert (stream.text, channel.cancelled) == ("", [])
