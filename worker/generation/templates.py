"""Makes the tokens of a prompt: of text, of token ids, or of chat messages by the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from millstream.broker.contract.errors import InvalidRequest, message_of
from millstream.broker.contract.prompt import Message, Prompt
from millstream.worker.generation.settings import TextSettings

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json


def encode_prompt(prompt: Prompt, settings: TextSettings) -> list[int]:
    """Returns the token ids of a prompt, special tokens included.

    Raises InvalidRequest if the text is not valid Unicode, if the model has no chat template, or if its template
    refuses the messages.
    """
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if prompt.messages is None:
        try:
            return list(settings.tokenizer(prompt.text)["input_ids"])
        except TypeError as error:  # the tokenizer's error for a lone surrogate
            raise InvalidRequest("the prompt is not valid Unicode") from error
    return _encode_messages(prompt.messages, prompt.tools, settings)


def _encode_messages(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Json]], settings: TextSettings
) -> list[int]:
    tokenizer = settings.tokenizer
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "the model has no chat template, so it takes no messages",
            hint="send the prompt as a string, or add a chat_template.jinja to the model's folder",
        )
    try:
        ids = tokenizer.apply_chat_template(
            [_plain(each) for each in messages],
            tools=[dict(each) for each in tools] or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise InvalidRequest(f"the model's chat template refuses the messages: {message_of(error)}") from error
    return list(cast(list[int], ids))


def _plain(message: Message) -> dict[str, Any]:
    """Returns a message as templates expect it: its content one string, the arguments of tool calls objects."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(cast(dict[str, Any], part)["text"]) for part in content)
    plain: dict[str, Any] = {**message, "content": content or ""}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        plain["tool_calls"] = [_with_arguments(each) for each in calls]
    return plain


def _with_arguments(call: Any) -> Any:
    """Returns a tool call whose arguments are an object: OpenAI's API has them as a string of JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not (isinstance(call, dict) and isinstance(function, dict) and isinstance(function.get("arguments"), str)):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def tool_calls_of(
    tokens: Sequence[int], prompt: Sequence[int], tools: Sequence[Mapping[str, Json]], settings: TextSettings
) -> list[Mapping[str, Json]]:
    """Returns the tool calls in generated tokens, each {"name": ..., "arguments": {...}}.

    It is empty if the tokenizer has no response template, or if the text does not follow it: then the text says all.
    """
    if not getattr(settings.tokenizer, "response_template", None):
        return []
    try:
        parsed = settings.tokenizer.parse_response(list(tokens), prefix=list(prompt), tools=[dict(t) for t in tools])
        calls = [_with_arguments({"function": each.get("function", each)}) for each in parsed.get("tool_calls") or ()]
        return [
            {"name": str(each["function"]["name"]), "arguments": each["function"].get("arguments") or {}}
            for each in calls
        ]
    except Exception:  # noqa: BLE001 - the text is the model's own, and may break off anywhere
        return []
