"""Fields of a request's body: each is read, ignored or refused, and none is left over. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, cast

from millstream.broker.contract.errors import InvalidRequest, did_you_mean
from millstream.broker.contract.job import Json

SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
)
"""Options of language models whose names and values are the same in OpenAI's API, and those of our own."""

TOKEN_IDS = "token ids are not supported"
"""Begin of the reason why an input is refused that is token ids: they depend on a tokenizer."""


class StreamFormat(NamedTuple):
    """How an answer is streamed. `usage`: a last chunk has the usage."""

    usage: bool


def wrong_field(name: str, reason: str, hint: str = "") -> InvalidRequest:
    """Returns the error of a field. Its message begins with the name, as those of models' options do."""
    return InvalidRequest(f"{name}: {reason}", hint=hint)


class Fields:
    """Fields of the body of a request to `url`, each taken once. A field that is null counts as left out."""

    def __init__(self, url: str, body: Mapping[str, Json]) -> None:
        self._url = url
        self._remaining = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def take(self, name: str, valid: Callable[[Json], bool], requirement: str) -> Json:
        """Returns a field's value, None if it is left out. Raises InvalidRequest if it is not `valid`."""
        self._known.add(name)
        value = self._remaining.pop(name, None)
        if value is not None and not valid(value):
            raise wrong_field(name, f"{str(value)[:80]!r} is not supported", requirement)
        return value

    def require(self, name: str) -> Json:
        """Returns the value of a field that must be there. Raises InvalidRequest if it is not."""
        self._known.add(name)
        if name not in self._remaining:
            raise wrong_field(name, f"{self._url} needs this field")
        return self._remaining.pop(name)

    def take_all(self, names: Iterable[str]) -> dict[str, Json]:
        """Returns those of the fields `names` that the body has, as they are: the model's options check them."""
        self._known.update(names := tuple(names))
        return {name: self._remaining.pop(name) for name in names if name in self._remaining}

    def ignore(self, *names: str) -> None:
        """Takes fields that change no result."""
        self.take_all(names)

    def refuse(self, name: str, harmless: Json) -> None:
        """Takes a field that is supported only with the value `harmless`. Raises InvalidRequest for another one."""
        self.take(name, lambda value: type(value) is type(harmless) and value == harmless, f"only {harmless!r} is")

    def finish(self) -> None:
        """Raises InvalidRequest if a field was not taken, and names it."""
        if self._remaining:
            name = next(iter(self._remaining))
            close = did_you_mean(name, self._known)
            hint = f"did you mean {close!r}?" if close else ""
            raise wrong_field(name[:80], f"{self._url} does not support this field", hint)


def read_stream(fields: Fields) -> StreamFormat | None:
    """Returns how the answer is streamed; None if it is not."""
    streams = fields.take("stream", lambda value: isinstance(value, bool), "true or false")
    options = fields.take(
        "stream_options", lambda value: isinstance(value, dict) and streams is True, "an object, if stream=true"
    )
    if not streams:
        return None
    given = Fields("stream_options", cast(dict[str, Json], options or {}))
    usage = given.take("include_usage", lambda value: isinstance(value, bool), "true or false")
    given.ignore("include_obfuscation")
    given.finish()
    return StreamFormat(bool(usage))


def read_options(fields: Fields, names: Iterable[str] | None = None) -> dict[str, Json]:
    """Returns the model's options: fields `names`, or by default those of a completion."""
    if names is not None:
        return fields.take_all(names)
    options = _read_sampling(fields)
    options |= fields.take_all(("logprobs",))
    return options


def read_chat_options(fields: Fields) -> dict[str, Json]:
    """Returns the options of a chat completion, whose names differ in part from those of a completion."""
    options = _read_sampling(fields)
    longest = fields.take_all(("max_completion_tokens",))
    if longest:
        options["max_tokens"] = longest["max_completion_tokens"]
    fields.refuse("parallel_tool_calls", True)
    fields.refuse("store", False)
    has_logprobs = fields.take("logprobs", lambda value: isinstance(value, bool), "true or false")
    most = fields.take(
        "top_logprobs", lambda value: isinstance(value, int) and has_logprobs is True, "needs logprobs=true"
    )
    if has_logprobs:
        options["logprobs"] = most or 0
    return options


def _read_sampling(fields: Fields) -> dict[str, Json]:
    fields.refuse("n", 1)
    fields.refuse("stream", False)
    options = fields.take_all(SAMPLING)
    if form := fields.take("response_format", lambda value: isinstance(value, dict), "an object"):
        options["response_format"] = _read_format(cast(dict[str, Json], form))
    return options


def _read_format(form: dict[str, Json]) -> Json:
    """Returns a response format as GenerateOptions has it. OpenAI's has the schema in an object with a name."""
    named = form.get("json_schema")
    if form.get("type") != "json_schema" or "schema" in form:
        return form
    if not (isinstance(named, dict) and isinstance(named.get("schema"), dict)):
        raise wrong_field("response_format", "it has no json_schema.schema", '{"name": ..., "schema": {...}}')
    return {"type": "json_schema", "schema": named["schema"]}
