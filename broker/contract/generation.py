"""Options and results of text generation. Pure: clients validate the options, workers apply them.

The result is the one value of a job's reply. Other operations that stream give the first two of its fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.options import Rule, check_options

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

MAX_REASON = 64
"""Most characters of a finish reason."""

STOP, LENGTH, DEADLINE = "stop", "length", "deadline"
"""Finish reasons of complete texts: the model or a stop string ended it; `max_tokens` or the model's context did; a
time limit did, and the text is what there was by then."""

MAX_STOPS = 16
"""Most stop strings, and most stop token ids, of a call."""

MAX_STOP = 256
"""Most characters of a stop string."""

MAX_LOGPROBS = 20
"""Most alternatives of a token whose log probabilities are reported."""

MAX_BIASES = 1_024
"""Most tokens with a bias."""

MAX_BIAS = 100.0
"""Largest bias of a token, as in OpenAI's API."""

MAX_SEED = 2**63 - 1

_FORMATS: Mapping[str, str | None] = {
    "text": None,
    "json_object": None,
    "json_schema": "schema",
    "regex": "pattern",
    "grammar": "grammar",
}
"""Types of a response format, and the field that each needs: `grammar` is in llguidance's variant of Lark."""

NO_BIAS: Mapping[str, float] = MappingProxyType({})


class GenerateOptions(NamedTuple):
    """The options of one call. None means the default of the model's generation_config.json, else no limit or effect.

    `max_tokens`: most tokens to generate; None generates to the end of the model's context. `temperature` 0 always
    takes the most probable token. `seed`: 0 to 2**63 - 1; None takes one from the job's id, and the result names it.
    `stop`: strings that end the text, and are not part of it. `logit_bias`: numbers to add to logits, by token id in
    decimal digits. `logprobs`: number of most probable tokens to report beside each token; 0 reports the token alone.
    `response_format`: {"type": "json_schema", "schema": ...}, {"type": "json_object"}, {"type": "regex", "pattern":
    ...} or {"type": "grammar", "grammar": ...}. `ignore_eos`: goes on after the model's end token.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[str, float] = NO_BIAS
    logprobs: int | None = None
    response_format: Mapping[str, Json] | None = None
    ignore_eos: bool = False

    @classmethod
    def read(cls, options: Mapping[str, Json]) -> GenerateOptions:
        """Returns the options of a call's JSON. Raises InvalidRequest if a name is unknown or a value is not valid.

        `stop` may be one string.
        """
        check_options(options, _RULES, "an llm service")
        given: dict[str, Json] = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            if name == "stop" and isinstance(value, str):
                given[name] = cast("Json", (value,))
            elif isinstance(value, list):
                given[name] = cast("Json", tuple(value))
        return cls(**cast(dict[str, int], given))  # type: ignore[arg-type]

    def json(self) -> dict[str, Json]:
        """Returns the options as `read` takes them, without those that have their default value."""
        given = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _is_number(value: Json, least: float, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_count(value: Json, least: int, most: int = 2**53) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_stop(value: Json) -> bool:
    stops = [value] if isinstance(value, str) else value
    return (
        isinstance(stops, list)
        and len(stops) <= MAX_STOPS
        and all(isinstance(each, str) and 0 < len(each) <= MAX_STOP for each in stops)
    )


def _is_bias(value: Json) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_BIASES
        and all(re.fullmatch("[0-9]{1,9}", token) for token in value)
        and all(_is_number(bias, -MAX_BIAS, MAX_BIAS) for bias in value.values())
    )


def _is_format(value: Json) -> bool:
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str) or kind not in _FORMATS:
        return False
    needed = _FORMATS[kind]
    if set(value) != {"type", *([needed] if needed else [])}:
        return False
    return needed is None or isinstance(value[needed], dict if needed == "schema" else str)


_PENALTY: Rule = (lambda value: _is_number(value, -2.0, 2.0), "a number from -2 to 2")

_RULES: Mapping[str, Rule] = {
    "max_tokens": (lambda value: _is_count(value, 1), "a whole number above 0"),
    "temperature": (
        lambda value: _is_number(value, 0.0, 100.0),
        "a number from 0 to 100; 0 takes the most probable token",
    ),
    "top_p": (lambda value: _is_number(value, 0.0, 1.0) and value != 0, "a number above 0, at most 1"),
    "top_k": (lambda value: _is_count(value, 0), "a whole number; 0 for all tokens"),
    "min_p": (lambda value: _is_number(value, 0.0, 1.0), "a number from 0 to 1"),
    "seed": (lambda value: _is_count(value, 0, MAX_SEED), "a whole number from 0 to 2**63 - 1"),
    "stop": (_is_stop, f"a string or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP} characters"),
    "stop_token_ids": (
        lambda value: isinstance(value, list) and len(value) <= MAX_STOPS and all(_is_count(each, 0) for each in value),
        f"a list of at most {MAX_STOPS} token ids",
    ),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (lambda value: _is_number(value, 0.01, 100.0), "a number from 0.01 to 100; 1 for none"),
    "logit_bias": (_is_bias, f"at most {MAX_BIASES} token ids as strings, each with a number from -100 to 100"),
    "logprobs": (lambda value: _is_count(value, 0, MAX_LOGPROBS), f"a whole number from 0 to {MAX_LOGPROBS}"),
    "response_format": (
        _is_format,
        '{"type": "json_schema", "schema": {...}}, {"type": "json_object"}, {"type": "regex", "pattern": "..."} '
        'or {"type": "grammar", "grammar": "..."}',
    ),
    "ignore_eos": (lambda value: isinstance(value, bool), "True or False"),
}


class Usage(NamedTuple):
    """Tokens of one text. `cached`: tokens of the prompt whose attention keys and values were computed before."""

    prompt: int
    completion: int
    cached: int = 0


class Logprob(NamedTuple):
    """A generated token, its natural log probability, and the most probable tokens in its place with theirs.

    Probabilities are the model's own, before temperature, penalties, biases and limits.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Generation(NamedTuple):
    """The result of a job: the whole text, and the reason for its end, such as "stop" or "length".

    `usage`, `seed` and `logprobs` are None if the worker gave none. `tool_calls`: calls of tools that the model's own
    format names, each {"name": ..., "arguments": {...}}.
    """

    text: str
    finish_reason: str
    usage: Usage | None = None
    seed: int | None = None
    logprobs: tuple[Logprob, ...] | None = None
    tool_calls: tuple[Mapping[str, Json], ...] = ()

    @classmethod
    def read(cls, value: Json) -> Generation:
        """Returns the result of a reply's value. Raises Malformed if it has another shape.

        Other fields are ignored: newer workers may add some.
        """
        if not isinstance(value, dict):
            raise Malformed(f"a result of type {type(value).__name__} in place of a text and its finish reason")
        text, reason, seed = value.get("text"), value.get("finish_reason"), value.get("seed")
        if not isinstance(text, str):
            raise Malformed("a result without a text")
        if not (isinstance(reason, str) and 0 < len(reason) <= MAX_REASON):
            raise Malformed("a result without a finish reason")
        if not (seed is None or _is_count(seed, 0, MAX_SEED)):
            raise Malformed("a result whose seed is no seed")
        calls = value.get("tool_calls", [])
        if not (isinstance(calls, list) and all(isinstance(each, dict) for each in calls)):
            raise Malformed("a result whose tool calls are no list of objects")
        usage, logprobs = read_usage(value.get("usage")), _read_logprobs(value.get("logprobs"))
        return cls(text, reason, usage, cast("int | None", seed), logprobs, tuple(cast("list[dict[str, Json]]", calls)))

    def json(self) -> dict[str, Json]:
        """Returns the result as `read` takes it, without what is None or empty."""
        value: dict[str, Json] = {"text": self.text, "finish_reason": self.finish_reason}
        if self.usage is not None:
            value["usage"] = list(self.usage)
        if self.seed is not None:
            value["seed"] = self.seed
        if self.logprobs is not None:
            value["logprobs"] = [[token, p, [list(each) for each in top]] for token, p, top in self.logprobs]
        if self.tool_calls:
            value["tool_calls"] = [dict(each) for each in self.tool_calls]
        return value


def read_usage(value: Json) -> Usage | None:
    """Returns the tokens that a result's field `usage` names; None if it has none. Raises Malformed."""
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 3 and all(_is_count(each, 0) for each in value)):
        raise Malformed("a result whose usage is not three counts of tokens")
    return Usage(*cast(list[int], value))


def _read_logprobs(value: Json) -> tuple[Logprob, ...] | None:
    if value is None:
        return None
    try:
        return tuple(
            Logprob(str(token), float(logprob), tuple((str(each), float(p)) for each, p in top))
            for token, logprob, top in cast("list[tuple[str, float, list[tuple[str, float]]]]", value)
        )
    except (TypeError, ValueError) as error:
        raise Malformed("a result whose log probabilities have another shape") from error
