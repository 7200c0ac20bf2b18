"""Cases of calls that generate a text: those that are refused, and those that get a text of a special kind.

tests/e2e/test_llm.py makes each of them beside a text that must not notice; docs/generation.md lists many of them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
from e2e.language_services import CONTEXT, Calls

from millstream.broker.contract.errors import Cancelled, InputTooLong, InvalidRequest, MillstreamError

PROMPT = "The miller grinds the corn"

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"mill": {"type": "boolean"}, "wheels": {"type": "integer"}, "name": {"enum": ["Emma", "Ben"]}},
    "required": ["mill", "wheels", "name"],
    "additionalProperties": False,
}


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def form(kind: str, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind, **fields}}


class Refusal(NamedTuple):
    """A call, the type of its error, and a regular expression of its message."""

    call: Callable[[Calls], object]
    error: type[MillstreamError]
    message: str


REFUSALS: Mapping[str, Refusal] = {
    "prompt longer than the context": Refusal(
        lambda calls: calls.generate("the mill " * CONTEXT),
        InputTooLong,
        rf"a prompt of \d+ tokens; prompt and text together have at most {CONTEXT} ",
    ),
    "prompt as long as the context": Refusal(
        lambda calls: calls.generate([5] * CONTEXT),
        InputTooLong,
        f"a prompt of {CONTEXT} tokens",
    ),
    "empty prompt": Refusal(lambda calls: calls.generate(""), InvalidRequest, "empty prompt"),
    "no message": Refusal(
        lambda calls: calls.chat([]), InvalidRequest, "messages is not a list of at least one message"
    ),
    "negative temperature": Refusal(lambda calls: calls.generate("a", temperature=-1), InvalidRequest, "temperature="),
    "negative top_k": Refusal(lambda calls: calls.generate("a", top_k=-1), InvalidRequest, "top_k="),
    "unknown role": Refusal(
        lambda calls: calls.chat([{"role": "miller", "content": "a"}]),
        InvalidRequest,
        r"messages\[0\]: role 'miller'",
    ),
    "token id out of range": Refusal(
        lambda calls: calls.generate([10**6]),
        InvalidRequest,
        r"the prompt: the model has no token 1000000 \(it has \d+\)",
    ),
    "stop token out of range": Refusal(
        lambda calls: calls.generate("a", stop_token_ids=[10**6]),
        InvalidRequest,
        "stop_token_ids: the model has no token 1000000",
    ),
    "bias of a token out of range": Refusal(
        lambda calls: calls.generate("a", logit_bias={10**6: 1.0}),
        InvalidRequest,
        "logit_bias: the model has no token 1000000",
    ),
    "grammar that cannot be compiled": Refusal(
        lambda calls: calls.generate("a", **form("grammar", grammar="start: (((")),
        InvalidRequest,
        r"response_format: .*Expected token",
    ),
    "regex that cannot be compiled": Refusal(
        lambda calls: calls.generate("a", **form("regex", pattern="([")),
        InvalidRequest,
        "response_format: .*unclosed character class",
    ),
    "schema that cannot be compiled": Refusal(
        lambda calls: calls.generate("a", **form("json_schema", schema={"type": "nonsense"})),
        InvalidRequest,
        "response_format: .*nonsense",
    ),
    "grammar without an end": Refusal(
        lambda calls: calls.generate("a", ignore_eos=True, **form("json_object")),
        InvalidRequest,
        "ignore_eos and response_format exclude each other",
    ),
}


def _is_greedy(calls: Calls) -> None:
    texts = {calls.generate("a", temperature=0, seed=seed, max_tokens=30).text for seed in (1, 2)}

    assert len(texts) == 1


def _samples_from_all(calls: Calls) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 30, "ignore_eos": True}

    assert calls.generate("a", top_k=10**9, **options).text == calls.generate("a", top_k=0, **options).text


def _stops(calls: Calls) -> None:
    whole = calls.generate("a", max_tokens=100, ignore_eos=True)
    stop = whole.text[40:44]
    got = calls.generate("a", max_tokens=100, ignore_eos=True, stop=["never said", stop])
    with calls.stream("a", max_tokens=100, ignore_eos=True, stop=stop) as stream:
        deltas = list(stream)

    assert (got.text, got.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert "".join(delta.text for delta in deltas) == got.text
    assert deltas[-1].finish_reason == "stop"


def _has_logprobs(calls: Calls) -> None:
    got = calls.generate("a", logprobs=3, max_tokens=20, ignore_eos=True)

    assert got.logprobs is not None
    assert len(got.logprobs) == got.usage["completion_tokens"] == 20
    for each in got.logprobs:
        assert [p for _, p in each.top] == sorted((p for _, p in each.top), reverse=True)
        assert each.top[0] == (each.token, each.logprob)
        assert len(each.top) == 3
        assert each.logprob < 0


def _is_json(calls: Calls) -> None:
    for seed in range(3):
        got = calls.generate("a", **form("json_schema", schema=SCHEMA), temperature=1.0, seed=seed, max_tokens=1_000)
        value = json.loads(got.text)

        assert got.finish_reason == "stop"
        assert value.keys() == {"mill", "wheels", "name"}
        assert (type(value["mill"]), type(value["wheels"]), value["name"] in ("Emma", "Ben")) == (bool, int, True)


def _follows_a_regex(calls: Calls) -> None:
    got = calls.generate("a", **form("regex", pattern="[a-f]{5,9}-[0-9]{3}"), temperature=1.0, seed=1)

    assert re.fullmatch("[a-f]{5,9}-[0-9]{3}", got.text)
    assert got.finish_reason == "stop"


def _chats(calls: Calls) -> None:
    roles = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]

    assert calls.chat(roles, max_tokens=5, ignore_eos=True).usage["completion_tokens"] == 5


def _leaves(calls: Calls) -> None:
    with calls.stream(PROMPT, ignore_eos=True) as stream:
        next(stream)
    with pytest.raises(Cancelled):
        list(stream)
    assert stream.generated is None


def _is_cut_by_its_deadline(calls: Calls) -> None:
    began = time.monotonic()
    got = calls.generate(PROMPT, ignore_eos=True, timeout=0.6)
    took_s = time.monotonic() - began
    with calls.stream(PROMPT, ignore_eos=True, timeout=0.6) as stream:
        deltas = list(stream)
    whole = calls.generate(PROMPT, ignore_eos=True, max_tokens=max(got.usage["completion_tokens"], 10) + 10)

    assert got.finish_reason == deltas[-1].finish_reason == "deadline"
    assert 0.55 < took_s < 0.9
    assert whole.text.startswith(got.text.rstrip("�"))
    assert got.text
    assert "".join(delta.text for delta in deltas) == (stream.generated or got).text != ""


ANSWERS: Mapping[str, Callable[[Calls], None]] = {
    "temperature 0": _is_greedy,
    "top_k above the vocabulary": _samples_from_all,
    "stop strings": _stops,
    "log probabilities": _has_logprobs,
    "JSON Schema": _is_json,
    "regular expression": _follows_a_regex,
    "all roles": _chats,
    "caller that leaves": _leaves,
    "deadline in mid-text": _is_cut_by_its_deadline,
}
"""A check of the answer for each case."""

EVENTS: Mapping[str, str] = {
    "worker killed in mid-text": "test_a_killed_worker_changes_no_text",
    "slow reader": "test_a_slow_reader_gets_the_rest_after_the_job_is_over",
}
"""Cases that are a test of their own in tests/e2e/test_llm.py, and its name."""
