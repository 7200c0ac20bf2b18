"""Result and arguments of `generate` and `chat`: a generated text, and the keywords that these calls take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypedDict, cast

import numpy as np

from millstream.broker.config.spec import PriorityName
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.generation import GenerateOptions, Generation, Logprob, Usage
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import GENERATE
from millstream.broker.contract.scalars import plain
from millstream.client.call_options import CallOptions

NO_USAGE: Mapping[str, int] = MappingProxyType({})

PromptInput = str | Sequence[int]
"""A prompt as a text, or as the ids of its tokens."""


class GenerateKeywords(TypedDict, total=False):
    """Keywords of `generate`, `chat` and their streams; all may be left out.

    `service` to `sticky_key` are those of Client.embed. The others go to the model: GenerateOptions explains them.
    """

    service: str | None
    priority: PriorityName
    timeout: float | None
    wait: bool
    tenant: str
    version: str
    sticky_key: str
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    logprobs: int | None
    response_format: Mapping[str, Any] | None
    ignore_eos: bool | None


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated text. `finish_reason`: "stop" if the model or a stop string ended it, "length", or "deadline".

    `usage` has "prompt_tokens", "completion_tokens", and "cached_tokens": tokens of the prompt that were computed
    before. It is empty if the worker counts none. The same call with `seed` gives the same text again if `fingerprint`,
    which names the weights, is the same. `version` is that of the route, or without a route equal to `fingerprint`.
    `logprobs` has one item for each token if the call asked for them. `tool_calls` are calls of tools, each
    {"name": ..., "arguments": {...}}. `timings` are in ms: `queue`, `inference` and `total`.
    """

    text: str
    finish_reason: str
    usage: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    version: str = ""
    logprobs: tuple[Logprob, ...] | None = None
    tool_calls: tuple[Mapping[str, Json], ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""

    @classmethod
    def of(cls, generation: Generation, fingerprint: str, timings: Mapping[str, float]) -> Generated:
        return cls(
            generation.text,
            generation.finish_reason,
            name_usage(generation.usage),
            generation.seed,
            fingerprint,
            generation.logprobs,
            generation.tool_calls,
            timings,
            fingerprint,
        )

    def timed(self, timings: Mapping[str, float]) -> Generated:
        """Returns a copy that has `timings`, too; its own ones stay."""
        return replace(self, timings={**timings, **self.timings})

    def json(self) -> dict[str, Json]:
        """Returns all fields as a JSON object."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": dict(self.usage),
            "seed": self.seed,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "logprobs": None if self.logprobs is None else [_logprob(each) for each in self.logprobs],
            "tool_calls": [dict(each) for each in self.tool_calls],
            "timings": dict(self.timings),
        }


def name_usage(usage: Usage | None) -> Mapping[str, int]:
    """Returns the counts of `usage` by their usual names; empty if there are none."""
    if usage is None:
        return NO_USAGE
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "cached_tokens": usage.cached,
    }


def _logprob(each: Logprob) -> Json:
    top: list[Json] = [{"token": token, "logprob": logprob} for token, logprob in each.top]
    return {"token": each.token, "logprob": each.logprob, "top": top}


_OF_CALL = ("priority", "timeout", "wait", "tenant", "version", "sticky_key")
"""Keywords that are options of the call, not of the model."""


def read_keywords(keywords: Mapping[str, object]) -> tuple[str | None, CallOptions]:
    """Returns the service, None for the only one, and the options of a call with GenerateKeywords.

    Raises InvalidRequest if the model's options have an unknown name or a value that is not valid.
    """
    given = dict(keywords)
    service = cast("str | None", given.pop("service", None))
    of_call = {name: given.pop(name) for name in _OF_CALL if name in given}
    options = GenerateOptions.read({name: _option(name, value) for name, value in given.items()}).json()
    return service, CallOptions(**cast(dict[str, Any], of_call))._replace(options=options, op=GENERATE.op)


def _option(name: str, value: object) -> Json:
    """Returns an option as JSON has it: no tuples, no numbers of NumPy, and token ids as keys in decimal digits."""
    if isinstance(value, np.ndarray) and value.ndim:
        return cast(Json, value.tolist())
    if isinstance(value, list | tuple):
        return [cast(Json, plain(each)) for each in value]
    if isinstance(value, Mapping):
        return {str(plain(key)): cast(Json, plain(each)) for key, each in value.items()}
    return cast(Json, plain(value))


def read_prompts(prompt: object) -> tuple[list[Json], bool]:
    """Returns the rows of `prompt`, and whether it is one prompt and not a list of prompts.

    Raises InvalidRequest if it is neither. A prompt in a list that is not valid is refused later, as its row's error.
    """
    prompt = plain(prompt)
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, list | tuple):
        raise InvalidRequest(
            f"not a prompt but {type(prompt).__name__}", hint="a prompt is a string or a list of token ids"
        )
    values = list(map(plain, prompt))
    if values and isinstance(values[0], int):
        return [{"token_ids": cast(list[Json], values)}], True
    return [_row(value) for value in values], False


def _row(value: object) -> Json:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return {"token_ids": [cast(Json, plain(each)) for each in value]} if isinstance(value, list | tuple) else value  # type: ignore[return-value]


def read_chat(messages: object, tools: object) -> Json:
    """Returns the row of a conversation. Raises InvalidRequest if it is no list of messages."""
    if not isinstance(messages, list | tuple):
        raise InvalidRequest(
            f"not a list of messages but {type(messages).__name__}",
            hint='a message is {"role": "user", "content": "..."}',
        )
    row: dict[str, Json] = {"messages": list(messages)}
    if tools is not None:
        row["tools"] = list(tools) if isinstance(tools, list | tuple) else cast(Json, tools)
    return row
