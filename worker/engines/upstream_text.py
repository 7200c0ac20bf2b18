"""Texts that a server generates: requests, events, and how a text goes on after a request broke. Pure: no I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.generation import LENGTH, STOP, GenerateOptions, Generation, Logprob, Usage
from millstream.broker.contract.job import Json
from millstream.broker.contract.partial import Record, text_of
from millstream.broker.contract.prompt import Prompt
from millstream.worker.engines.upstream_wire import Call, Server, broken, clean

MOST_CHARACTERS = 8 * 1024 * 1024
"""Characters of a text above which the server's answer is not read on."""

_REASONS: Mapping[str, str] = {
    "stop": STOP,
    "eos": STOP,
    "stop_sequence": STOP,
    "tool_calls": STOP,
    "function_call": STOP,
    "content_filter": STOP,
    "length": LENGTH,
    "max_tokens": LENGTH,
}
"""Finish reasons of servers. Others, such as "abort" and "error", are no end of a text."""


def finish_reason(reason: Json) -> str:
    """Returns our finish reason. Raises Fault if the server broke off."""
    found = _REASONS.get(reason) if isinstance(reason, str) else None
    if not found:
        raise broken(f"it ended the text with the reason {str(reason)[:40]!r}")
    return found


def seed_of(job_id: str) -> int:
    """Returns the seed of a job without one."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4], "little")


class Event(NamedTuple):
    """Content of one event of a stream. `tokens`: tokens of the whole answer so far, 0 if the event states none."""

    text: str = ""
    finish: str = ""
    usage: Usage | None = None
    tokens: int = 0
    logprobs: Sequence[Logprob] = ()


@dataclass(slots=True, eq=False)
class Text:
    """One row: its prompt and options, and its text so far.

    `shown`: the text that was made known, which is never changed. `answer`: text of the running request. `tokens`:
    tokens of `shown`; an event that does not say how many tokens it holds counts one. `continues`: the running request
    goes on behind `shown`; otherwise it begins again, and its text is compared with `shown`. `has_diverged`: the
    texts differ; then nothing more is shown, and the result has the new text. `calls`: parts of tool calls, by index.
    """

    prompt: Prompt
    options: GenerateOptions
    model_name: str
    seed: int = 0
    shown: str = ""
    tokens: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    continues: bool = False
    answer: str = ""
    answer_logprobs: list[Logprob] = field(default_factory=list)
    before_tokens: int = 0
    reported: int = 0
    finish: str = ""
    usage: Usage | None = None
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    has_diverged: bool = False
    tries: int = 0
    strikes: int = 0

    def begin(self, job_id: str, records: Sequence[Record]) -> None:
        """Goes on behind `records`. Raises ValueError if a record's state cannot be read."""
        self.seed = seed_of(job_id) if self.options.seed is None else self.options.seed
        self.shown = text_of(records)
        for record in records:
            state = json.loads(record.state or b"{}")
            self.tokens += int(state.get("n", 0))
            self.logprobs += [Logprob(token, p, tuple((t, q) for t, q in top)) for token, p, top in state.get("l", ())]

    @property
    def is_full(self) -> bool:
        """Whether `max_tokens` are there already."""
        most = self.options.max_tokens
        return bool(self.shown) and most is not None and self.tokens >= most

    @property
    def _is_free(self) -> bool:
        """Whether the text may be cut into two requests: no grammar and no tools, which begin anew with each."""
        given = self.options.response_format
        return not self.prompt.tools and (given is None or given["type"] == "text")

    def start(self, *, may_continue: bool) -> None:
        """Begins a request. `may_continue`: the server can go on behind a text of such a prompt."""
        self.continues = bool(self.shown) and may_continue and self._is_free
        self.answer, self.answer_logprobs, self.calls = "", [], {}
        self.before_tokens, self.reported = self.tokens, 0
        self.finish, self.usage, self.has_diverged = "", None, False

    def most_tokens(self) -> int | None:
        """Most tokens of the running request."""
        most = self.options.max_tokens
        return most if most is None or not self.continues else max(1, most - self.tokens)

    def add(self, event: Event) -> Record | None:
        """Adds an event of the running request. Returns the record of new text; None if it has none to show.

        Raises Fault if the text is too long.
        """
        self.usage, self.finish = event.usage or self.usage, event.finish or self.finish
        if not (event.text or event.logprobs):
            return None
        if len(self.answer) > MOST_CHARACTERS:
            raise broken(f"its text has more than {MOST_CHARACTERS} characters")
        text = clean(event.text)
        self.answer += text
        count = max(0, event.tokens - self.reported) if event.tokens else len(event.logprobs) or 1
        self.reported = event.tokens
        self.answer_logprobs += event.logprobs
        if self.continues:
            return self._record(text, count, event.logprobs)
        return self._compared(count, event.logprobs)

    def _compared(self, count: int, logprobs: Sequence[Logprob]) -> Record | None:
        """The record of the part of the answer behind `shown`, as long as the answer begins with `shown`."""
        if self.has_diverged:
            return None
        if not self.answer.startswith(self.shown):
            self.has_diverged = not self.shown.startswith(self.answer)
            return None
        text = self.answer[len(self.shown) :]
        return self._record(text, count, logprobs) if text else None

    def _record(self, text: str, count: int, logprobs: Sequence[Logprob]) -> Record:
        self.shown += text
        self.tokens += count
        self.logprobs += logprobs
        self.tries = self.strikes = 0
        state: dict[str, object] = {"n": count}
        if logprobs:
            state["l"] = [[each.token, each.logprob, [list(top) for top in each.top]] for each in logprobs]
        return Record(text, json.dumps(state).encode())

    def result(self, reason: str = "") -> Generation:
        """The result if the text ends here. `reason`: its finish reason, if it is not the server's."""
        is_whole = bool(self.finish) and not self.continues
        text = self.answer if is_whole else self.shown
        usage = self.usage and self._whole_usage(self.usage)
        logprobs = (self.answer_logprobs if is_whole else self.logprobs) if self.options.logprobs is not None else None
        return Generation(
            text,
            reason or self.finish,
            usage,
            self.seed,
            None if logprobs is None else tuple(logprobs),
            tuple(_tool_call(self.calls[at]) for at in sorted(self.calls)),
        )

    def _whole_usage(self, usage: Usage) -> Usage:
        if not self.continues:
            return usage
        before = self.before_tokens
        return Usage(max(0, usage.prompt - before), usage.completion + before, usage.cached)

    def add_call(self, index: int, name: str, arguments: str) -> None:
        """Adds a part of a tool call."""
        call = self.calls.setdefault(index, {"name": "", "arguments": ""})
        call["name"] += clean(name)
        call["arguments"] += clean(arguments)


def _tool_call(call: Mapping[str, str]) -> Mapping[str, Json]:
    """The call with its arguments as an object, if they are JSON; otherwise as the text that the model wrote."""
    try:
        arguments = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        arguments = call["arguments"]
    return {"name": call["name"], "arguments": arguments}


# -- servers with OpenAI's routes ----------------------------------------------------------------------------------

_PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Options whose None means the server's default."""


_REGEX = ("vllm", "sglang")
"""Families of servers that take a regular expression."""

_STREAM: Mapping[str, Json] = {"include_usage": True}
_STREAM_COUNTED: Mapping[str, Json] = {"include_usage": True, "continuous_usage_stats": True}


class OpenAI:
    """Completions and chat completions, streamed as server-sent events."""

    def check(self, prompt: Prompt, options: GenerateOptions, server: Server) -> None:
        """Raises InvalidRequest if such a server cannot run it."""
        kind = (options.response_format or {}).get("type")
        if kind == "grammar":
            raise InvalidRequest("a grammar in llguidance's variant of Lark", hint="a server needs a json_schema")
        if kind == "regex" and server.family not in _REGEX:
            raise InvalidRequest(
                "a response_format of type regex: OpenAI's routes have none", hint="only vLLM and SGLang add one"
            )

    def may_continue(self, prompt: Prompt, server: Server) -> bool:
        """Whether the server can go on behind a text of this prompt."""
        if prompt.messages is None:
            return prompt.text is not None
        return server.continues_chats and prompt.messages[-1]["role"] != "assistant"

    def call(self, text: Text, server: Server) -> Call:
        is_chat = text.prompt.messages is not None
        body = self._options(text, is_chat, server) | (self._chat(text) if is_chat else self._completion(text))
        return Call("/chat/completions" if is_chat else "/completions", body, streams=True)

    @staticmethod
    def _chat(text: Text) -> dict[str, Json]:
        body: dict[str, Json] = {"messages": [dict(each) for each in text.prompt.messages or ()]}
        if text.prompt.tools:
            body["tools"] = [dict(each) for each in text.prompt.tools]
        if text.continues:
            cast("list[Json]", body["messages"]).append({"role": "assistant", "content": text.shown})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body

    @staticmethod
    def _completion(text: Text) -> dict[str, Json]:
        if text.prompt.token_ids is not None:
            return {"prompt": list(text.prompt.token_ids)}
        return {"prompt": (text.prompt.text or "") + (text.shown if text.continues else "")}

    @staticmethod
    def _options(text: Text, is_chat: bool, server: Server) -> dict[str, Json]:
        options = text.options
        body: dict[str, Json] = {
            "model": text.model_name,
            "stream": True,
            "stream_options": dict(_STREAM_COUNTED if server.counts_on else _STREAM),
            "seed": text.seed,
        }
        most = text.most_tokens()
        if most is not None or not is_chat:
            # Completions get null, too: without it their limit is 16 tokens.
            body["max_tokens"] = most
        body |= {name: value for name in _PLAIN if (value := getattr(options, name)) is not None}
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(options, name):
                body[name] = getattr(options, name)
        if options.stop:
            body["stop"] = list(options.stop)
        if options.stop_token_ids:
            body["stop_token_ids"] = list(options.stop_token_ids)
        if options.logit_bias:
            body["logit_bias"] = dict(options.logit_bias)
        if options.ignore_eos:
            body["ignore_eos"] = True
        if options.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": options.logprobs} if is_chat else {"logprobs": options.logprobs}
        return body | _format(options, server)

    def read(self, text: Text, value: Mapping[str, Json]) -> Event:
        """Returns what an event says, and adds its parts of tool calls to `text`. Raises Fault."""
        usage = _usage(value.get("usage"))
        choices = value.get("choices")
        if not isinstance(choices, list):
            raise broken("an event of its answer has no choices")
        if not choices:
            return Event(usage=usage)
        choice = choices[0]
        if not isinstance(choice, dict):
            raise broken("an event of its answer has a choice that is no object")
        delta = choice.get("delta")
        content = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        if isinstance(delta, dict):
            _add_calls(text, delta.get("tool_calls"))
        reason = choice.get("finish_reason")
        return Event(
            content if isinstance(content, str) else "",
            finish_reason(reason) if reason else "",
            usage,
            usage.completion if usage else 0,
            _logprobs(choice.get("logprobs")) if text.options.logprobs is not None else (),
        )


def _format(options: GenerateOptions, server: Server) -> dict[str, Json]:
    given = options.response_format
    match given and given["type"]:
        case "json_schema":
            return {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "strict": True, "schema": (given or {})["schema"]},
                }
            }
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "regex":
            pattern = (given or {})["pattern"]
            return {"regex": pattern} if server.family == "sglang" else {"structured_outputs": {"regex": pattern}}
    return {}


def _count(value: Json) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _usage(value: Json) -> Usage | None:
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return Usage(_count(value.get("prompt_tokens")), _count(value.get("completion_tokens")), cached)


def _add_calls(text: Text, calls: Json) -> None:
    for place, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(call, dict) and isinstance(function, dict):
            name, arguments, index = function.get("name"), function.get("arguments"), call.get("index", place)
            arguments = json.dumps(arguments) if isinstance(arguments, dict) else arguments
            text.add_call(_count(index), str(name or ""), str(arguments or ""))


def _logprobs(value: Json) -> Sequence[Logprob]:
    """Log probabilities of a choice, of chats and of completions. Raises Fault."""
    if not isinstance(value, dict):
        return ()
    try:
        if "content" in value:
            content = cast("list[dict[str, object]]", value["content"] or [])
            return [_logprob(each) for each in content]
        tokens = cast("list[str]", value.get("tokens") or [])
        numbers = cast("list[float]", value.get("token_logprobs") or [])
        tops = cast("list[dict[str, float] | None]", value.get("top_logprobs") or [None] * len(tokens))
        return [
            Logprob(clean(token), _number(p), tuple((clean(t), _number(q)) for t, q in (top or {}).items()))
            for token, p, top in zip(tokens, numbers, tops, strict=True)
        ]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise broken(f"its log probabilities have another shape: {type(error).__name__}") from error


def _logprob(value: Mapping[str, object]) -> Logprob:
    top = cast("list[dict[str, object]]", value.get("top_logprobs") or [])
    tops = tuple((clean(str(each["token"])), _number(each["logprob"])) for each in top)
    return Logprob(clean(str(value["token"])), _number(value["logprob"]), tops)


def _number(value: object) -> float:
    number = float(cast(float, value))
    # JSON of most servers has no infinity: they send a large number, which is kept.
    return max(-1e9, min(0.0, number)) if number == number else -1e9


# -- Ollama's own routes -------------------------------------------------------------------------------------------


class Ollama:
    """Ollama's own routes, one JSON object a line.

    Its OpenAI route for completions puts the model's template around a prompt, so that a text could not go on there;
    /api/generate with `raw` does not.
    """

    def check(self, prompt: Prompt, options: GenerateOptions, server: Server) -> None:
        """Raises InvalidRequest if Ollama cannot run it."""
        if prompt.token_ids is not None:
            raise InvalidRequest("Ollama takes no token ids", hint="send text or messages")
        unknown = [
            name
            for name, value in (
                ("logit_bias", options.logit_bias),
                ("stop_token_ids", options.stop_token_ids),
                ("ignore_eos", options.ignore_eos),
                ("logprobs", options.logprobs is not None),
            )
            if value
        ]
        kind = (options.response_format or {}).get("type", "text")
        if kind not in ("text", "json_schema", "json_object"):
            unknown.append(f"response_format of type {kind}")
        if unknown:
            raise InvalidRequest(f"Ollama has no {unknown[0]}", hint="leave it out")

    def may_continue(self, prompt: Prompt, server: Server) -> bool:
        """Whether Ollama can go on behind a text of this prompt."""
        return prompt.text is not None

    def call(self, text: Text, server: Server) -> Call:
        body: dict[str, Json] = {"model": text.model_name, "stream": True, "options": _ollama_options(text)}
        given = text.options.response_format or {}
        if given.get("type") == "json_schema":
            body["format"] = given["schema"]
        elif given.get("type") == "json_object":
            body["format"] = "json"
        if text.prompt.messages is None:
            prompt = (text.prompt.text or "") + (text.shown if text.continues else "")
            return Call("/api/generate", body | {"prompt": prompt, "raw": True}, streams=True)
        body["messages"] = [dict(each) for each in text.prompt.messages]
        if text.prompt.tools:
            body["tools"] = [dict(each) for each in text.prompt.tools]
        return Call("/api/chat", body, streams=True)

    def read(self, text: Text, value: Mapping[str, Json]) -> Event:
        """Returns what a line says, and adds its tool calls to `text`. Raises Fault."""
        message = value.get("message")
        content = message.get("content") if isinstance(message, dict) else value.get("response")
        if isinstance(message, dict):
            calls = message.get("tool_calls")
            for call in calls if isinstance(calls, list) else ():
                _add_calls(text, [cast(Json, {"index": len(text.calls), **call})] if isinstance(call, dict) else None)
        finish, usage = "", None
        if value.get("done") is True:
            finish = finish_reason(value.get("done_reason") or "stop")
            usage = Usage(_count(value.get("prompt_eval_count")), _count(value.get("eval_count")))
        return Event(content if isinstance(content, str) else "", finish, usage, usage.completion if usage else 0)


def _ollama_options(text: Text) -> dict[str, Json]:
    options, most = text.options, text.most_tokens()
    settings: dict[str, Json] = {"seed": text.seed % 2**31, "num_predict": -1 if most is None else most}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if (value := getattr(options, name)) is not None:
            settings[name] = value
    if options.repetition_penalty is not None:
        settings["repeat_penalty"] = options.repetition_penalty
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(options, name):
            settings[name] = getattr(options, name)
    if options.stop:
        settings["stop"] = list(options.stop)
    return settings


Route = OpenAI | Ollama
