"""The row of a job of a language model: what to continue. Pure: clients validate it, workers read it.

A row is text, chat messages with the tools that the model may call, or token ids. As JSON: a string,
{"messages": [...], "tools": [...]}, or {"token_ids": [...]}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from millstream.broker.contract.errors import InvalidRequest

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a message. The model's chat template may refuse some of them."""

_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})

Message = Mapping[str, "Json"]
"""One message: `role`, one of ROLES, and `content`, a string or a list of {"type": "text", "text": ...}."""


class Prompt(NamedTuple):
    """A prompt: one of `text`, `messages` and `token_ids` is not None. `tools` go with messages, as JSON Schemas."""

    text: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    tools: Sequence[Mapping[str, Json]] = ()

    @classmethod
    def read(cls, row: Json) -> Prompt:
        """Returns the prompt of a row. Raises InvalidRequest if it has another shape or is empty."""
        if isinstance(row, str):
            if not row:
                raise InvalidRequest("an empty prompt", hint="a model needs text to continue")
            return cls(text=row)
        if not isinstance(row, dict):
            raise InvalidRequest(f"a prompt of type {type(row).__name__}", hint=_FORMS)
        if set(row) == {"token_ids"}:
            return cls(token_ids=_token_ids(row["token_ids"]))
        if "messages" in row and set(row) <= {"messages", "tools"}:
            return cls(messages=_messages(row["messages"]), tools=_tools(row.get("tools")))
        raise InvalidRequest(f"a prompt with the fields {', '.join(sorted(row)) or 'of nothing'}", hint=_FORMS)

    def json(self) -> Json:
        """Returns the row as `read` takes it."""
        if self.text is not None:
            return self.text
        if self.token_ids is not None:
            return {"token_ids": list(self.token_ids)}
        tools: dict[str, Json] = {"tools": [dict(each) for each in self.tools]} if self.tools else {}
        return {"messages": [dict(each) for each in self.messages or ()], **tools}


_FORMS = 'a prompt is a string, {"messages": [...]} or {"token_ids": [...]}'


def _token_ids(value: Json) -> Sequence[int]:
    if not (isinstance(value, list) and value):
        raise InvalidRequest("token_ids is not a list of at least one token id")
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value):
        raise InvalidRequest("token_ids holds a value that is no token id", hint="a token id is a whole number from 0")
    return cast(list[int], value)


def _messages(value: Json) -> Sequence[Message]:
    if not (isinstance(value, list) and value):
        raise InvalidRequest("messages is not a list of at least one message")
    for at, each in enumerate(value):
        if problem := _problem(each):
            raise InvalidRequest(f"messages[{at}]: {problem}")
    return cast("list[dict[str, Json]]", value)


def _problem(message: Json) -> str:
    """Returns the fault of one message; "" if there is none."""
    if not isinstance(message, dict):
        return f"not an object but {type(message).__name__}"
    role, content = message.get("role"), message.get("content")
    if not (isinstance(role, str) and role in ROLES):
        return f"role {str(role)[:40]!r} is not one of {', '.join(ROLES)}"
    if unknown := sorted(message.keys() - _FIELDS):
        return f"unknown field {unknown[0][:40]!r}"
    if isinstance(content, str) or (content is None and role == "assistant" and message.get("tool_calls")):
        return ""
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        return ""
    return 'content is neither a string nor a list of {"type": "text", "text": "..."}'


def _is_text_part(part: Json) -> bool:
    return (
        isinstance(part, dict)
        and set(part) == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _tools(value: Json) -> Sequence[Mapping[str, Json]]:
    if value is None:
        return ()
    if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise InvalidRequest(
            "tools is not a list of JSON Schemas", hint='each is {"type": "function", "function": {...}}'
        )
    return cast("list[dict[str, Json]]", value)
