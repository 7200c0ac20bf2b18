"""Chunks of a streamed answer in the shape of OpenAI's API, made of the pieces of one text. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from millstream.broker.contract.job import Json
from millstream.client.generate import Generated
from millstream.client.openai.answers import (
    Stamp,
    chat_logprobs,
    completion_logprobs,
    reason_of,
    tool_calls,
    usage_of,
)
from millstream.client.openai.requests import CHAT, OpenAICall


class Chunks:
    """Bodies of the chunks of one answer: `begin`, then `piece` for each piece of the text, then `end`."""

    def __init__(self, call: OpenAICall, stamp: Stamp) -> None:
        self._is_chat = call.url == CHAT
        self._stamp = stamp
        self._has_usage = call.stream is not None and call.stream.usage

    def begin(self) -> Iterator[dict[str, Json]]:
        """Yields the chunk that a chat begins with: it has the role."""
        if self._is_chat:
            yield self._chunk([self._choice({"role": "assistant", "content": ""})])

    def piece(self, text: str) -> dict[str, Json]:
        """Returns the chunk of a piece of the text."""
        return self._chunk([self._choice({"content": text}, text)])

    def end(self, text: Generated) -> Iterator[dict[str, Json]]:
        """Yields the chunks behind the text: the finish reason, and the usage if the request asks for it.

        The finish reason comes with the calls of tools and the log probabilities of all tokens.
        """
        delta: dict[str, Json] = {}
        if text.tool_calls:
            calls = enumerate(tool_calls(text, self._stamp))
            delta["tool_calls"] = [{"index": at, **each} for at, each in calls if isinstance(each, dict)]
        choice = self._choice(delta)
        choice["finish_reason"] = reason_of(text)
        choice["logprobs"] = chat_logprobs(text) if self._is_chat else completion_logprobs(text)
        yield self._chunk([choice])
        if self._has_usage:
            yield {**self._chunk([]), "usage": usage_of([text])}

    def _choice(self, delta: dict[str, Json], text: str = "") -> dict[str, Json]:
        content: dict[str, Json] = {"delta": delta} if self._is_chat else {"text": text}
        return {"index": 0, **content, "logprobs": None, "finish_reason": None}

    def _chunk(self, choices: list[Json] | list[dict[str, Json]]) -> dict[str, Json]:
        prefix, kind = ("chatcmpl", "chat.completion.chunk") if self._is_chat else ("cmpl", "text_completion")
        chunk: dict[str, Json] = {
            "id": f"{prefix}-{self._stamp.id}",
            "object": kind,
            "created": self._stamp.created,
            "model": self._stamp.model,
            "choices": list(choices),
        }
        return {**chunk, "usage": None} if self._has_usage else chunk
