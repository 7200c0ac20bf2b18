"""Spans of jobs say what their replies say: the code of an error, tokens, the reason why a text ended."""

from __future__ import annotations

import numpy as np

from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.job import Address, Claim, Job, Json, Reply
from millstream.broker.contract.stages import Stages
from millstream.telemetry.traces import Ending
from millstream.worker.job_spans import job_of
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import ActiveJob

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STAGES = Stages("w")


def active(body: bytes = b'{"inputs":["a"]}', trace: str = TRACE) -> ActiveJob:
    job = Job("a" * 32, 1, "generate", 1, 1, 0, 0, "me", "", trace, body)
    return ActiveJob(Claim(Address("2:1-0", job.id, "me"), job), job, [Prepared(1, None)])


def ending(reply: Reply) -> Ending:
    made = job_of(active(), reply, STAGES, 0.0)
    assert made
    return made.ending


def test_a_text_has_the_tokens_of_its_usage_and_its_finish_reason() -> None:
    values: list[Json] = [{"text": "x", "finish_reason": "length", "usage": [7, 9, 2]}]

    assert ending(Reply(values=values, tokens=16)) == Ending("", 7, 9, ["length"])


def test_a_text_has_the_time_of_its_first_piece_and_the_tokens_of_its_prompt_that_were_computed_before() -> None:
    run = active()
    run.first_output_at = 1_234
    values: list[Json] = [{"text": "x", "finish_reason": "length", "usage": [7, 9, 2]}]

    made = job_of(run, Reply(values=values, tokens=16), STAGES, 0.0)

    assert made
    assert (made.first_output, made.cached_tokens) == (1_234, 2)


def test_vectors_and_other_values_have_the_tokens_of_the_job() -> None:
    assert ending(Reply(vectors=np.ones((1, 2), np.float32), tokens=3)) == Ending("", 3)
    assert ending(Reply(values=[{"text": 1}], tokens=3)) == Ending("", 3)
    assert ending(Reply(values=[1, 2], tokens=3)) == Ending("", 3)


def test_a_failed_job_or_row_has_the_code_of_its_error() -> None:
    error = ModelFailed("quotes an input")

    assert ending(Reply(error=error)) == Ending("model_failed")
    assert ending(Reply(values=[1], errors={1: error}, tokens=3)) == Ending("model_failed", 3)


def test_a_job_whose_call_is_not_traced_has_no_span() -> None:
    run = active(trace="")

    assert job_of(run, Reply(), STAGES, 0.0) is None
    assert job_of(run.claim, Reply(), STAGES, 0.0) is None
    assert job_of(None, Reply(), STAGES, 0.0) is None
    assert job_of(active(), Reply(), None, 0.0) is None


def test_a_job_that_was_not_prepared_has_a_span_without_a_batch() -> None:
    run = active()
    run.batch_trace = "batch"

    prepared, claimed = job_of(run, Reply(), STAGES, 0.0), job_of(run.claim, Reply(), STAGES, 0.0)

    assert prepared
    assert claimed
    assert (prepared.batch_trace, claimed.batch_trace) == ("batch", "")


def test_a_chat_is_known_by_its_body() -> None:
    chat = active(b'{"inputs":[{"messages":[]}]}')

    made, prompt = job_of(chat, Reply(), STAGES, 0.0), job_of(active(), Reply(), STAGES, 0.0)

    assert made
    assert prompt
    assert (made.is_chat, prompt.is_chat) == (True, False)
