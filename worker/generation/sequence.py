"""One text as it grows: from its prompt, token by token, to the result of its job."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Series
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from millstream.broker.contract.errors import InputTooLong, InvalidRequest, Malformed, ModelFailed
from millstream.broker.contract.generation import LENGTH, STOP, GenerateOptions, Generation, Logprob, Usage
from millstream.broker.contract.partial import Record, text_of
from millstream.broker.contract.prompt import Prompt
from millstream.worker.generation.detokenizer import Detokenizer
from millstream.worker.generation.grammar import Grammar, Grammars
from millstream.worker.generation.penalties import Biases, Occurrences
from millstream.worker.generation.record import Token, decode_tokens, encode_token
from millstream.worker.generation.settings import TextSettings
from millstream.worker.generation.stops import Stops
from millstream.worker.generation.templates import encode_prompt, tool_calls_of

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

ReadsCalls = Callable[[Series[int], Series[int]], Series[Mapping[str, "Json"]]]
"""Returns the tool calls in generated tokens; the second argument is the prompt."""


class Added(NamedTuple):
    """A token's effect: a record for a successor and the client, and the finish reason, "" while the text goes on."""

    record: Record
    reason: str


class Sequence:
    """One text. It changes by `begin` once, then by `add`; everything else only reads.

    `tokens`: ids of the prompt and of what was generated. `limit`: most tokens to generate. `reason`: why the text
    ended, "" while it goes on: after `begin` it may have ended already. `cached`: tokens of the prompt that were not
    computed again, for the result; the engine sets it. `is_plain`: whether each token is the most probable one of the
    model's own logits, and nothing else is asked for.
    """

    def __init__(
        self,
        prompt: Series[int],
        options: GenerateOptions,
        settings: TextSettings,
        *,
        continues: bool = True,
        grammar: Grammar | None = None,
        read_calls: ReadsCalls | None = None,
    ) -> None:
        """`continues`: the text is shown behind its prompt, so its first word keeps the space before it.

        Raises InvalidRequest if an option does not fit the model, InputTooLong if its context has no room for a token.
        """
        _check(prompt, options, settings)
        if grammar and options.ignore_eos:
            raise InvalidRequest("ignore_eos and response_format exclude each other: a grammar ends its text")
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.options = options
        self.sampling = settings.defaults.resolve(options)
        most = settings.context - len(prompt)
        self.limit = min(options.max_tokens or settings.defaults.max_tokens or most, most)
        self.seed = 0 if options.seed is None else options.seed
        self.reason = ""
        self.cached = 0
        self.biases = Biases({int(token): bias for token, bias in options.logit_bias.items()})
        self.occurrences = Occurrences(prompt if self.sampling.repetition_penalty != 1.0 else ())
        self.grammar = grammar
        self.is_plain = (
            self.sampling.temperature == 0
            and not self.sampling.penalises
            and not options.logit_bias
            and options.logprobs is None
            and grammar is None
        )
        self._settings = settings
        self._read_calls = read_calls
        self._ends = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else settings.eos)
        self._detokenizer = Detokenizer(settings.backend, settings.special, prompt if continues else ())
        self._stops = Stops(options.stop)
        self._is_cut = False
        self._pieces: list[str] = []
        self._logprobs: list[Token] = []

    @classmethod
    def of(cls, prompt: Prompt, options: GenerateOptions, settings: TextSettings, grammars: Grammars) -> Sequence:
        """Returns the text of a call. Raises InvalidRequest if prompt or options do not fit the model."""
        ids = encode_prompt(prompt, settings)
        read_calls = None if prompt.messages is None else partial(tool_calls_of, tools=prompt.tools, settings=settings)
        grammar = grammars.compile(options.response_format)
        return cls(ids, options, settings, continues=prompt.messages is None, grammar=grammar, read_calls=read_calls)

    @property
    def generated(self) -> int:
        """Number of generated tokens: the index of the next one."""
        return len(self.tokens) - self.prompt_length

    def begin(self, job_id: str, records: Series[Record]) -> None:
        """Takes the seed from the job's id, unless one is given, and goes on behind `records` of earlier runs.

        Raises ModelFailed if their tokens do not give their text again.
        """
        if self.options.seed is None:
            self.seed = seed_of(job_id)
        reason = ""
        for token in _tokens_of(records):
            if reason not in ("", LENGTH):
                raise ModelFailed("the records of an earlier run go on after the end of its text")
            reason = self.add(token).reason
        shown = text_of(records)
        if self.text != shown:
            raise ModelFailed(
                f"the tokens of an earlier run give another text than the {len(shown)} characters that were shown",
                hint="its worker had another tokenizer or another release",
            )

    @property
    def text(self) -> str:
        """The text shown so far."""
        return "".join(self._pieces)

    def add(self, token: Token) -> Added:
        """Adds a generated token. Raises ModelFailed if the grammar does not allow it."""
        self.tokens.append(token.id)
        if self.sampling.penalises:
            self.occurrences.add(token.id)
        if self.options.logprobs is not None:
            self._logprobs.append(token)
        piece, self.reason = self._follow(token.id)
        if piece:
            self._pieces.append(piece)
        return Added(Record(piece, encode_token(token)), self.reason)

    def _follow(self, token: int) -> tuple[str, str]:
        """Returns the text that a token makes certain, and the finish reason. An end token has no text."""
        if token in self._ends:
            return "", STOP
        if self.grammar and not self.grammar.accept(token):
            raise ModelFailed(f"the grammar does not go on with token {token}: {self.grammar.error}")
        piece, self._is_cut = self._stops.feed(self._detokenizer.step(token))
        if self._is_cut or (self.grammar and self.grammar.is_over):
            return piece, STOP
        return piece, LENGTH if self.generated >= self.limit else ""

    def conclude(self, reason: str) -> Json:
        """Returns the job's result if its text ends now. Text that was held back belongs to it. Changes nothing.

        It has a log probability for each generated token, an end token included, if the call asked for them.
        """
        text = self.text if self._is_cut else self.text + self._stops.end(self._detokenizer.tail())
        logprobs = tuple(map(self._named, self._logprobs)) if self.options.logprobs is not None else None
        prompt, generated = self.tokens[: self.prompt_length], self.tokens[self.prompt_length :]
        calls = self._read_calls(generated, prompt) if self._read_calls else ()
        usage = Usage(self.prompt_length, self.generated, self.cached)
        return Generation(text, reason, usage, self.seed, logprobs, tuple(calls)).json()

    def _named(self, token: Token) -> Logprob:
        name = self._settings.token_text
        top = tuple((name(other), _rounded(value)) for other, value in token.top)
        return Logprob(name(token.id), _rounded(token.logprob or 0.0), top)


def seed_of(job_id: str) -> int:
    """Returns 63 bits of a hash of a job's id."""
    digest = hashlib.blake2b(job_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _tokens_of(records: Series[Record]) -> Iterator[Token]:
    """Yields the tokens of records. Raises ModelFailed if they are of another engine or release."""
    try:
        for record in records:
            yield from decode_tokens(record.state)
    except Malformed as error:
        raise ModelFailed(f"the records of an earlier run cannot be read: {error}") from error


def _rounded(logprob: float) -> float:
    """Returns the shortest number that is the same float32: it makes the reply shorter."""
    return float(str(np.float32(logprob)))


def _check(prompt: Series[int], options: GenerateOptions, settings: TextSettings) -> None:
    vocabulary = settings.vocabulary
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", hint="a model needs text to continue")
    if len(prompt) >= settings.context:
        raise InputTooLong(
            f"a prompt of {len(prompt)} tokens; prompt and text together have at most {settings.context}",
            hint="shorten the prompt",
        )
    for name, tokens in (
        ("the prompt", prompt),
        ("stop_token_ids", options.stop_token_ids),
        ("logit_bias", map(int, options.logit_bias)),
    ):
        if (largest := max(tokens, default=0)) >= vocabulary:
            raise InvalidRequest(f"{name}: the model has no token {largest}", hint=f"it has {vocabulary}")
