"""Options, prompts and results of text generation: JSON to records and back, and refusals."""

from __future__ import annotations

import pytest

from millstream.broker.contract.errors import InvalidRequest, Malformed
from millstream.broker.contract.generation import GenerateOptions, Generation, Logprob, Usage
from millstream.broker.contract.job import Json
from millstream.broker.contract.prompt import Prompt

OPTIONS: dict[str, Json] = {
    "max_tokens": 5,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["\n", "END"],
    "stop_token_ids": [2],
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"12": -100},
    "logprobs": 3,
    "response_format": {"type": "json_schema", "schema": {"type": "object"}},
    "ignore_eos": True,
}


def test_options_are_read_from_json_and_written_back() -> None:
    assert GenerateOptions.read(OPTIONS).json() == OPTIONS
    assert GenerateOptions.read({}) == GenerateOptions()
    assert GenerateOptions().json() == {}
    assert set(OPTIONS) == set(GenerateOptions._fields)


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert GenerateOptions.read({"stop": "END"}).stop == ("END",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 257]),
        ("stop_token_ids", [-1]),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", [1]),
        ("logprobs", 21),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "schema": "x"}),
        ("response_format", {"type": ["text"]}),
        ("response_format", {"type": "regex", "pattern": 1}),
        ("ignore_eos", 1),
        ("best_of", 2),
    ],
)
def test_an_option_that_is_not_valid_is_refused_by_name(name: str, value: Json) -> None:
    with pytest.raises(InvalidRequest, match=name):
        GenerateOptions.read({name: value})


@pytest.mark.parametrize(
    "row",
    [
        "Once upon a time",
        {"token_ids": [1, 2, 3]},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
        {
            "messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    ],
)
def test_a_prompt_is_read_from_json_and_written_back(row: Json) -> None:
    assert Prompt.read(row).json() == row


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("", "empty prompt"),
        (None, "NoneType"),
        (5, "int"),
        ({}, "fields"),
        ({"text": "a"}, "fields text"),
        ({"token_ids": []}, "at least one"),
        ({"token_ids": [1, -1]}, "no token id"),
        ({"token_ids": [True]}, "no token id"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["hello"]}, r"messages\[0\]: not an object"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"messages\[0\]: role 'wizard'"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "a", "mood": "b"}]}, "unknown field 'mood'"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": ["f"]}, "tools"),
        ({"messages": [{"role": "user", "content": "a"}], "token_ids": [1]}, "fields"),
    ],
)
def test_a_row_that_is_no_prompt_is_refused_with_its_fault(row: Json, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        Prompt.read(row)


def test_a_generation_is_read_from_json_and_written_back() -> None:
    logprobs = (Logprob("a", -0.5, (("a", -0.5), ("b", -1.5))), Logprob("b", -2.0))
    whole = Generation("ab", "stop", Usage(3, 2, 1), 7, logprobs, ({"name": "f", "arguments": {}},))

    assert Generation.read(whole.json()) == whole
    assert Generation.read({"text": "a", "finish_reason": "stop"}) == Generation("a", "stop")


@pytest.mark.parametrize(
    "extra",
    [
        {"usage": [1, 2]},
        {"usage": [1, 2, "3"]},
        {"seed": -1},
        {"seed": "7"},
        {"logprobs": [["a"]]},
        {"logprobs": [["a", "b", []]]},
        {"logprobs": 3},
        {"tool_calls": ["f"]},
        {"tool_calls": {}},
    ],
)
def test_a_generation_of_another_shape_is_malformed(extra: dict[str, Json]) -> None:
    with pytest.raises(Malformed):
        Generation.read({"text": "a", "finish_reason": "stop", **extra})
