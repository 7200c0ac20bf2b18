"""The engine of servers that already run, against a stub on this host: nothing is lost, and every fault has its end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from upstream_stub import Stub, serving, vector

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import (
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    ModelUnavailable,
)
from millstream.broker.contract.generation import Generation
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import ModelType
from millstream.broker.contract.partial import Record, text_of
from millstream.broker.contract.slots import Demand, Slots
from millstream.worker import models
from millstream.worker.engines import upstream, upstream_http, upstream_model
from millstream.worker.engines.upstream import STRIKES, TRIES, Upstream
from millstream.worker.engines.upstream_http import queued
from millstream.worker.engines.upstream_wire import Kind, fault_of
from millstream.worker.models.base import Generates, Prepared
from millstream.worker.scheduling.active_job import Outcome
from millstream.worker.scheduling.batcher import Budget, Row
from millstream.worker.scheduling.upstream_limit import START

WITHIN_S = 20.0


def spec(stub: Stub, kind: ModelType = "llm", backend: str = "openai", **runtime: object) -> ServiceSpec:
    model = ModelSpec.model_validate({"type": kind, "backend": backend, "url": stub.url, "model_name": "m"})
    settings = Runtime.model_validate({"batch_size": 4, **runtime})
    return ServiceSpec(name="mill", model=model, model_ref="m", runtime=settings)


class Mill:
    """A model, its engine, and rows that wait: what a runner does with them, in one thread."""

    def __init__(self, model: models.Model) -> None:
        self.model = model
        self.engine = cast(Upstream, cast(Any, self.model).start_engine())
        self.waiting: list[Row[Prepared]] = []
        self.running: list[Row[Prepared]] = []
        self.records: dict[str, list[Record]] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.displaced = 0

    def put(self, *inputs: Json, records: Sequence[Record] = (), **options: Json) -> list[str]:
        names = []
        for value in inputs:
            name = str(len(self.records))
            self.records[name] = list(records)
            (row,) = self.model.prepare([value], options)
            if isinstance(row, MillstreamError):
                self.outcomes[name] = row
            else:
                if isinstance(self.model, Generates):
                    self.model.begin(row, f"job {name}", records)
                self.waiting.append(Row(row.tokens, (0, len(self.records)), name, 0, row))
            names.append(name)
        return names

    def step(self) -> None:
        room = self.engine.room()
        assert room
        batch, self.waiting = self.waiting[: room.rows], self.waiting[room.rows :]
        if batch:
            self.running += batch
            self.engine.admit(batch)
        if not self.engine.busy:
            time.sleep(0.005)
            return
        step = self.engine.step()
        for row, record in step.records:
            self.records[row.owner].append(record)
        for row, outcome in zip(step.rows, step.outcomes, strict=True):
            assert row.owner not in self.outcomes
            self.outcomes[row.owner] = outcome
        gone = {id(row) for row in (*step.rows, *step.displaced)}
        assert gone <= {id(row) for row in self.running}
        self.running = [row for row in self.running if id(row) not in gone]
        self.displaced += len(step.displaced)
        self.waiting = sorted([*self.waiting, *step.displaced], key=lambda row: row.urgency)

    def until(self, holds: Callable[[], object], within_s: float = WITHIN_S) -> None:
        ends = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < ends, "not within the time"
            self.step()

    def finish(self) -> None:
        self.until(lambda: not self.waiting and not self.running)

    def shown(self, name: str) -> str:
        return text_of(self.records[name])

    def text(self, name: str) -> Generation:
        outcome = self.outcomes[name]
        assert not isinstance(outcome, MillstreamError), outcome
        return Generation.read(cast(Json, outcome))


@contextmanager
def milling(made: ServiceSpec | None = None, *, model: models.Model | None = None) -> Iterator[Mill]:
    mill = Mill(model or models.load(cast(ServiceSpec, made), None, 1))
    try:
        yield mill
    finally:
        cast(Any, mill.model).close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "LONGEST_REFUSED_S", 0.2)
    monkeypatch.setattr(upstream, "LONGEST_PROBE_S", 0.2)
    monkeypatch.setattr(upstream_model, "STALL_S", 1.0)


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["openai", "ollama"])
@pytest.mark.parametrize("prompt", ["a:", {"messages": [{"role": "user", "content": "hi"}]}], ids=["text", "chat"])
def test_a_text_passes_through_as_it_grows(backend: str, prompt: Json) -> None:
    with serving(Stub(step_s=0.01)) as stub, milling(spec(stub, backend=backend)) as mill:
        (name,) = mill.put(prompt, max_tokens=6, temperature=0.5)
        mill.finish()

        head = "a" if isinstance(prompt, str) else "w"
        whole = "".join(f"{head}{n} " for n in range(8))
        text = mill.text(name)
        assert text.text == mill.shown(name)
        assert whole.startswith(text.text)
        assert text.usage is not None
        assert text.usage.prompt == 4
        assert text.seed is not None
        assert len(mill.records[name]) > 3
        path, body = stub.requests[0]
        assert body["model"] == "m"
        assert "/api/" in path if backend == "ollama" else body["seed"] == text.seed


def test_several_requests_are_in_flight_at_once_and_each_gets_its_own_text() -> None:
    with serving(Stub(step_s=0.02)) as stub, milling(spec(stub)) as mill:
        names = mill.put(*[f"p{n}:" for n in range(12)])
        mill.finish()

        for at, name in enumerate(names):
            assert mill.text(name).text == mill.shown(name) == "".join(f"p{at}{n} " for n in range(8))
        assert stub.most > 1


@pytest.mark.parametrize(
    "fault", ["half", "end", "malformed", "error", "stall", "reset", "silence", "not json", 500, 502]
)
def test_a_text_whose_request_breaks_goes_on_where_it_ended(fault: str | int) -> None:
    with serving(Stub(faults=[fault])) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:", max_tokens=8)
        mill.finish()

        assert mill.text(name).text == mill.shown(name) == "".join(f"a{n} " for n in range(8))
        assert len(stub.requests) == 2
        if fault in ("half", "stall"):
            assert stub.requests[1][1]["prompt"] == "a:a0 a1 a2 "
            assert stub.requests[1][1]["max_tokens"] == 5


def test_a_successor_goes_on_behind_the_records_of_the_worker_before() -> None:
    with serving(Stub()) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:", records=[Record("a0 ", b'{"n": 1}'), Record("a1 ", b'{"n": 1}')], max_tokens=8)
        mill.finish()

        text = mill.text(name)
        assert text.text == "".join(f"a{n} " for n in range(8))
        assert (text.usage and text.usage.completion) == 8
        assert [each.text for each in mill.records[name]][:3] == ["a0 ", "a1 ", "a2 "]


def test_a_text_that_was_complete_when_its_worker_died_needs_no_request() -> None:
    with serving(Stub()) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:", records=[Record("a0 ", b'{"n": 1}')], max_tokens=1)
        mill.finish()

        assert mill.text(name)[:2] == ("a0 ", "length")
        assert stub.requests == []


CHAT: Json = {"messages": [{"role": "user", "content": "hi"}]}


def test_a_chat_goes_on_if_the_server_can() -> None:
    with serving(Stub(faults=["half"])) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put(CHAT)
        mill.finish()

        assert mill.text(name).text == mill.shown(name) == "".join(f"w{n} " for n in range(8))
        again = stub.requests[1][1]
        assert again["messages"][-1] == {"role": "assistant", "content": "w0 w1 w2 "}
        assert (again["add_generation_prompt"], again["continue_final_message"]) == (False, True)


def test_a_chat_begins_again_on_other_servers_and_shows_only_what_is_new() -> None:
    with serving(Stub(faults=["half"], owned_by="someone")) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put(CHAT)
        mill.finish()

        assert mill.text(name).text == mill.shown(name) == "".join(f"w{n} " for n in range(8))
        assert stub.requests[1][1]["messages"] == [{"role": "user", "content": "hi"}]


def test_a_text_that_differs_when_it_begins_again_is_answered_whole_and_never_spliced() -> None:
    with serving(Stub(faults=["half"], owned_by="someone")) as stub, milling(spec(stub)) as mill:
        stub.say = lambda body: [f"{'x' if len(stub.requests) > 1 else 'w'}{n} " for n in range(5)]
        (name,) = mill.put(CHAT)
        mill.finish()

        assert mill.shown(name) == "w0 w1 w2 "
        assert mill.text(name).text == "".join(f"x{n} " for n in range(5))


def test_a_text_that_fills_the_context_when_it_goes_on_is_complete() -> None:
    with serving(Stub()) as stub, milling(spec(stub)) as mill:
        stub.refuse = lambda body: 400
        (name,) = mill.put("a:", records=[Record("a0 ", b'{"n": 1}')])
        mill.finish()

        assert mill.text(name)[:2] == ("a0 ", "length")


def test_log_probabilities_survive_a_broken_request() -> None:
    with serving(Stub(faults=["half"])) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:", logprobs=1)
        mill.finish()

        found = mill.text(name).logprobs
        assert found is not None
        assert [each.token for each in found] == [f"a{n} " for n in range(8)]


def test_halves_of_characters_are_replaced_and_end_nothing() -> None:
    with serving(Stub()) as stub, milling(spec(stub)) as mill:
        stub.say = lambda body: ["a\ud83d", "b😀"]
        (name,) = mill.put("a:")
        mill.finish()

        assert mill.text(name).text == "a\ufffdb😀"


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_has_too_much_to_do_fails_no_job(status: int) -> None:
    with serving(Stub(faults=[status] * 20)) as stub, milling(spec(stub)) as mill:
        names = mill.put("a:", "b:")
        mill.finish()

        assert [mill.text(name).finish_reason for name in names] == ["stop", "stop"]
        assert mill.displaced >= 10
        assert len(stub.requests) == 22


@pytest.mark.parametrize(("status", "kind"), [(400, InvalidRequest), (404, InvalidRequest), (422, InvalidRequest)])
def test_a_request_that_the_server_refuses_is_the_callers_fault(status: int, kind: type[MillstreamError]) -> None:
    with serving(Stub(faults=[status])) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:")
        mill.finish()

        assert type(mill.outcomes[name]) is kind
        assert f"fault {status}" in str(mill.outcomes[name])
        assert len(stub.requests) == 1


def test_a_key_that_is_refused_fails_the_job_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Stub(always=403)) as stub, milling(spec(stub)) as mill:
        names = mill.put("a:", "b:", "c:")
        mill.finish()

        assert all(isinstance(mill.outcomes[name], ModelFailed) for name in names)
        assert "refuses the key" in str(mill.outcomes[names[0]])
        assert sum("api_key_file" in record.message for record in caplog.records) == 1


def test_a_server_that_fails_each_time_fails_the_job_after_a_few_tries() -> None:
    with serving(Stub(always=500)) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:")
        mill.finish()

        assert isinstance(mill.outcomes[name], ModelFailed)
        assert len(stub.requests) == TRIES


def test_an_answer_that_breaks_off_at_once_each_time_fails_its_job_and_no_other() -> None:
    with serving(Stub()) as stub, milling(spec(stub)) as mill:
        whole = Stub.texts

        def say(body: dict[str, Any]) -> list[str]:
            if body["prompt"].startswith("bad"):
                raise BrokenPipeError
            stub.say = None
            try:
                return whole(stub, body)
            finally:
                stub.say = say

        stub.say = say
        bad, *good = mill.put("bad:", "a:", "b:")
        mill.finish()

        assert isinstance(mill.outcomes[bad], ModelFailed)
        assert f"{STRIKES} times" in str(mill.outcomes[bad])
        assert all(mill.text(name).finish_reason == "stop" for name in good)


def test_while_the_server_is_away_rows_wait_and_nothing_is_sent() -> None:
    with serving(Stub()) as stub:
        made = spec(stub)
        port = int(stub.url.split(":")[2].split("/")[0])
        mill = Mill(models.load(made, None, 1))
    names = mill.put("a:", "b:", "c:")
    mill.until(lambda: mill.engine.away and mill.displaced >= 3)
    ends = time.monotonic() + 0.5
    mill.until(lambda: time.monotonic() > ends)

    assert len(mill.running) <= 1
    assert mill.outcomes == {}
    with serving(stub, port):
        mill.finish()
        assert [mill.text(name).finish_reason for name in names] == ["stop"] * 3
        assert mill.engine.away == ""
        cast(Any, mill.model).close()


def test_a_server_that_restarts_in_the_middle_loses_nothing() -> None:
    stub = Stub(step_s=0.05)
    with serving(stub):
        made = spec(stub)
        port = int(stub.url.split(":")[2].split("/")[0])
        mill = Mill(models.load(made, None, 1))
        names = mill.put(*[f"{letter}:" for letter in "abcd"])
        mill.until(lambda: any(len(each) >= 3 for each in mill.records.values()))
    ends = time.monotonic() + 0.3
    mill.until(lambda: time.monotonic() > ends)
    with serving(stub, port):
        mill.finish()
        for name, letter in zip(names, "abcd", strict=True):
            assert mill.text(name).text == mill.shown(name) == "".join(f"{letter}{n} " for n in range(8))
        cast(Any, mill.model).close()


def test_an_aborted_row_closes_its_request() -> None:
    with serving(Stub(words=500, step_s=0.02)) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:")
        mill.until(lambda: mill.records[name])
        mill.engine.abort(mill.running)
        mill.running = []

        assert not mill.engine.busy
        ends = time.monotonic() + WITHIN_S
        while stub.running and time.monotonic() < ends:
            time.sleep(0.01)
        assert stub.running == 0
        assert stub.hung_up == 1


def test_a_row_that_was_aborted_goes_on_when_it_is_admitted_again() -> None:
    with serving(Stub(step_s=0.02)) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:")
        mill.until(lambda: mill.records[name])
        mill.engine.abort(mill.running)
        mill.waiting, mill.running = mill.running, []
        mill.finish()

        assert mill.text(name).text == mill.shown(name) == "".join(f"a{n} " for n in range(8))


def test_a_text_that_is_ended_early_gives_what_it_has() -> None:
    with serving(Stub(words=500, step_s=0.02)) as stub, milling(spec(stub)) as mill:
        (name,) = mill.put("a:")
        mill.until(lambda: len(mill.records[name]) > 2)
        (outcome,) = mill.engine.conclude(mill.running, "deadline")

        assert Generation.read(cast(Json, outcome))[:2] == (mill.shown(name), "deadline")


def test_an_answer_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_http, "MOST_LINE", 10_000)
    with serving(Stub()) as stub, milling(spec(stub)) as mill:
        stub.say = lambda body: ["x" * 20_000]
        (name,) = mill.put("a:")
        mill.finish()

        assert isinstance(mill.outcomes[name], ModelFailed)
        assert "10000 bytes" in str(mill.outcomes[name])


def test_the_fault_of_an_answer_says_what_to_do() -> None:
    assert fault_of(429, b"", "7").retry_s == 7.0
    assert fault_of(503, b"", "Wed, 21 Oct 2015 07:28:00 GMT").retry_s == 0.0
    assert fault_of(400, b'{"error": {"message": "the maximum context length is 8"}}').too_long
    assert [fault_of(each, b"").kind for each in (401, 502, 504, 418, 599)] == [
        Kind.KEY,
        Kind.AWAY,
        Kind.AWAY,
        Kind.INVALID,
        Kind.FAILED,
    ]


# -- vectors and scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["openai", "tei", "ollama"])
def test_texts_are_embedded_many_a_request_in_their_order(backend: str) -> None:
    with serving(Stub(step_s=0.02)) as stub, milling(spec(stub, "embedding", backend)) as mill:
        names = mill.put(*["x" * n for n in range(1, 11)])
        mill.finish()

        for at, name in enumerate(names, 1):
            assert np.array_equal(cast(Any, mill.outcomes[name]), np.array(vector("x" * at), np.float32))
        assert len(stub.requests) < 10


def test_vectors_are_cut_normalized_and_encoded_here() -> None:
    with serving(Stub()) as stub, milling(spec(stub, "embedding")) as mill:
        cut, unit = mill.put("abc", dimensions=2)[0], mill.put("abc", normalize=True)[0]
        half, prompted = mill.put("abc", encoding="float16")[0], mill.put("abc", prompt="q: ")[0]
        refused = mill.put("abc", truncate="end")[0]
        mill.finish()

        outcomes = cast(dict[str, Any], mill.outcomes)
        assert outcomes[cut].tolist() == [3.0, 1.0]
        assert np.linalg.norm(outcomes[unit]) == pytest.approx(1.0)
        assert outcomes[half].dtype == np.float16
        assert outcomes[prompted].tolist() == vector("q: abc")
        assert isinstance(outcomes[refused], InvalidRequest)


@pytest.mark.parametrize("backend", ["openai", "tei"])
def test_documents_are_scored_in_their_order(backend: str) -> None:
    with serving(Stub()) as stub, milling(spec(stub, "reranker", backend)) as mill:
        names = mill.put("a", "bbb", "cc", query="q")
        others = mill.put("dddd", query="other")
        mill.finish()

        assert [mill.outcomes[name] for name in (*names, *others)] == [1.0, 3.0, 2.0, 4.0]
        assert {body["query"] for _, body in stub.requests} == {"q", "other"}


def test_one_text_that_the_server_refuses_fails_no_other_of_its_request() -> None:
    with serving(Stub()) as stub, milling(spec(stub, "embedding")) as mill:
        stub.refuse = lambda body: 400 if "bad!" in body["input"] else 0
        names = mill.put("a", "bb", "bad!", "cccc")
        mill.finish()

        kinds = [isinstance(mill.outcomes[name], MillstreamError) for name in names]
        assert kinds == [False, False, True, False]
        assert isinstance(mill.outcomes[names[2]], InputTooLong)


def test_a_row_that_breaks_the_server_fails_no_other_of_its_request() -> None:
    with serving(Stub()) as stub, milling(spec(stub, "embedding")) as mill:
        stub.refuse = lambda body: 500 if "bad!" in body["input"] else 0
        names = mill.put("a", "bb", "bad!", "cccc")
        mill.finish()

        assert [type(mill.outcomes[name]) is ModelFailed for name in names] == [False, False, True, False]


# -- the server as a whole -----------------------------------------------------------------------------------------


def test_a_worker_that_may_not_share_its_slots_goes_on_alone() -> None:
    class Refused:
        consumer = "a"

        def exchange(self, demand: Demand, version: int, state: str) -> Slots:
            raise PermissionError

        def leave(self) -> None:
            raise PermissionError

    with serving(Stub()) as stub:
        model = models.load(spec(stub), None, 1)
        cast(Any, model).share_by(Refused(), lambda: 0)
        with milling(model=model) as mill:
            names = mill.put("a:", "b:")
            mill.finish()
            mill.until(lambda: mill.engine.room() == Budget(START, 10**9, packs=True))

            assert [mill.text(name).finish_reason for name in names] == ["stop", "stop"]


def test_a_queue_inside_the_server_is_read_from_its_metrics() -> None:
    text = '# HELP x\nvllm:num_requests_waiting{model_name="m"} 3.0\nvllm:num_requests_running{m="m"} 9\n'

    assert queued(text) == 3
    assert queued("te_queue_size 4\n") == 4
    assert queued("llamacpp:requests_deferred nonsense\n") == 0
    assert queued("") == 0


def test_the_key_comes_from_a_file_and_goes_to_the_server(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    with serving(Stub(key="secret")) as stub:
        made = spec(stub)
        with pytest.raises(ModelUnavailable, match="refuses the key"):
            models.load(made, None, 1)
        own = made.model.model_copy(update={"api_key_file": file})
        with milling(made.with_key(own)) as mill:
            (name,) = mill.put("a:")
            mill.finish()

            assert mill.text(name).finish_reason == "stop"
        elsewhere = own.model_copy(update={"url": "http://other:1/v1"})
        assert made.with_key(elsewhere).model.api_key_file is None


def test_a_fingerprint_names_backend_model_and_what_the_server_says() -> None:
    with serving(Stub()) as stub:
        first, second = models.load(spec(stub), None, 1), models.load(spec(stub), None, 1)
        stub.owned_by = "another"
        third = models.load(spec(stub), None, 1)

    assert first.fingerprint.startswith("upstream:openai:m:")
    assert first.fingerprint == second.fingerprint != third.fingerprint


def test_a_model_that_the_server_does_not_have_is_named_with_those_it_has() -> None:
    with serving(Stub()) as stub:
        made = spec(stub)
        other = made.model_copy(update={"model": made.model.model_copy(update={"model_name": "n"})})
        with pytest.raises(ModelUnavailable, match=r"no model 'n'.*it has: m"):
            models.load(other, None, 1)


def test_a_worker_waits_for_a_server_that_is_not_there_yet() -> None:
    with serving(Stub()) as stub:
        port = int(stub.url.split(":")[2].split("/")[0])
    loaded: list[object] = []
    thread = threading.Thread(target=lambda: loaded.append(models.load(spec(stub), None, 1)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()

    with serving(stub, port):
        thread.join(WITHIN_S)
    assert loaded


def test_a_worker_of_such_a_service_imports_no_torch() -> None:
    program = """
import sys
from millstream.worker import process, lane
from millstream.worker.engines import upstream_model
from millstream.worker.supervision import supervisor
print(*sorted({"torch", "transformers", "sentence_transformers"} & sys.modules.keys()))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert told.stdout.split() == []
