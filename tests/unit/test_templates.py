"""Prompts as tokens, chat templates, and tool calls in what a model wrote."""

from __future__ import annotations

from copy import copy

import pytest
from texts import byte_level, ids_of, text_settings
from transformers import PreTrainedTokenizerFast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.prompt import Prompt
from millstream.worker.generation.settings import TextSettings
from millstream.worker.generation.templates import encode_prompt, tool_calls_of

WEATHER: Json = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

RESPONSE_TEMPLATE = {
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "content": {"close": "<|im_end|>", "content": "text"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


def with_(**changes: object) -> TextSettings:
    """The settings of a tokenizer with other attributes."""
    tokenizer: PreTrainedTokenizerFast = copy(byte_level())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return text_settings(tokenizer)


def rendered(row: Json) -> str:
    return byte_level().backend_tokenizer.decode(
        encode_prompt(Prompt.read(row), text_settings()), skip_special_tokens=False
    )


def test_text_and_token_ids_are_taken_as_they_are() -> None:
    assert encode_prompt(Prompt.read("the mill"), text_settings()) == ids_of("the mill")
    assert encode_prompt(Prompt.read({"token_ids": [7, 8]}), text_settings()) == [7, 8]


def test_a_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        encode_prompt(Prompt("\ud800"), text_settings())


def test_messages_are_rendered_by_the_chat_template() -> None:
    row: Json = {"messages": [{"role": "user", "content": "hello"}], "tools": [WEATHER]}

    assert rendered(row) == "<|im_start|>user\nhello<|im_end|>\ntools: 1\n<|im_start|>assistant\n"


def test_parts_of_text_become_one_text() -> None:
    parts: Json = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert "user\na\nb<|im_end|>" in rendered({"messages": [{"role": "user", "content": parts}]})


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_the_arguments_of_a_tool_call_may_be_a_string_of_json(arguments: Json) -> None:
    call: Json = {"type": "function", "function": {"name": "weather", "arguments": arguments}}

    row: Json = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}

    assert "assistant\n[weather Oslo]<|im_end|>" in rendered(row)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "developer", "content": "a"}], "no developer here"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}], "function"),
    ],
)
def test_messages_that_the_template_refuses_are_an_invalid_request_with_its_reason(messages: Json, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"chat template refuses the messages: .*{reason}"):
        rendered({"messages": messages})


def test_a_model_without_a_chat_template_says_what_to_do() -> None:
    prompt = Prompt.read({"messages": [{"role": "user", "content": "hello"}]})

    with pytest.raises(InvalidRequest, match=r"no chat template.*send the prompt as a string"):
        encode_prompt(prompt, with_(chat_template=None))


def test_tool_calls_are_read_by_the_tokenizers_response_template() -> None:
    settings = with_(response_template=RESPONSE_TEMPLATE)
    prompt = ids_of("<|im_start|>assistant\n")
    first = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
    second = '<call>{"name": "stop"}</call><call>{"name": "go", "arguments": "{\\"a\\": 1}"}</call><|im_end|>'

    assert tool_calls_of(ids_of(f"So: {first}{second}"), prompt, [], settings) == [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "stop", "arguments": {}},
        {"name": "go", "arguments": {"a": 1}},
    ]
    assert tool_calls_of(ids_of("no calls<|im_end|>"), prompt, [], settings) == []


def test_a_call_that_breaks_off_or_a_model_without_a_response_template_gives_no_calls() -> None:
    prompt, text = ids_of("<|im_start|>assistant\n"), '<call>{"name": "weat'

    assert tool_calls_of(ids_of(text), prompt, [], with_(response_template=RESPONSE_TEMPLATE)) == []
    assert tool_calls_of(ids_of(f'{text}her"}}</call>'), prompt, [], text_settings()) == []
