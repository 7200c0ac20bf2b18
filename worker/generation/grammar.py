"""Texts that follow a grammar: JSON Schema, JSON, a regular expression, or llguidance's variant of Lark.

llguidance, the extra `structured`, tells for each step which tokens may come next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from millstream.broker.contract.errors import InvalidRequest, ModelFailed
from millstream.worker.generation.settings import TextSettings

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
except ImportError:  # the extra is not installed
    LLMatcher = None  # type: ignore[misc, assignment]

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""White space between the tokens of JSON. llguidance allows any amount, and some models then end in endless space."""


class Grammars:
    """Compiles the response formats of one model's calls."""

    def __init__(self, settings: TextSettings) -> None:
        self._settings = settings

    def compile(self, response_format: Mapping[str, Json] | None) -> Grammar | None:
        """Returns the grammar of a call, None if its text is free.

        Raises InvalidRequest if llguidance refuses it, with its reason, or if it is not installed.
        """
        if response_format is None or response_format["type"] == "text":
            return None
        if LLMatcher is None:
            raise InvalidRequest(
                "response_format: the worker has no llguidance", hint='pip install "millstream[structured]" there'
            )
        if not self._settings.eos:
            raise InvalidRequest("response_format: the model has no end token, which a grammar needs")
        limits = LLParserLimits(verbose_errors=False)
        try:
            matcher = LLMatcher(self._tokenizer, _source(response_format), log_level=0, limits=limits)
        except ValueError as error:
            raise _refused(str(error)) from error
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(matcher, self._words)

    @property
    def _words(self) -> int:
        """Number of 32-bit words of a mask."""
        return -(-self._tokenizer.vocab_size // 32)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """llguidance's form of the tokenizer. Takes about a second for a large vocabulary."""
        settings = self._settings
        size = max(settings.vocabulary, settings.backend.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(settings.backend.to_str(), n_vocab=size, eos_token=sorted(settings.eos))


class Grammar:
    """The state of one text in its grammar."""

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros(words, dtype=np.int32)
        self._address = self._mask.ctypes.data
        self._is_filled = False

    @property
    def is_over(self) -> bool:
        """Whether nothing but an end token can follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """llguidance's reason for the refusal of a token."""
        return self._matcher.get_error().partition("\n")[0]

    def accept(self, token: int) -> bool:
        """Adds a token that is not an end token. Returns False if the grammar does not allow it."""
        self._is_filled = False
        return self._matcher.consume_token(token)

    def fill(self) -> None:
        """Computes on the CPU which tokens may come next, for `allowed`."""
        if not self._is_filled:
            self._matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
            self._is_filled = True

    @property
    def allowed(self) -> NDArray[np.int32]:
        """A bit for each token, 1 if it may come next; in words of 32 bits."""
        self.fill()
        return self._mask

    @property
    def fault(self) -> ModelFailed | None:
        """An error if the grammar is too costly to follow."""
        return ModelFailed(f"response_format: {self.error}") if self._matcher.is_error() else None


def excluded_by(grammars: Sequence[Grammar], vocabulary: int) -> NDArray[np.bool_]:
    """Returns which tokens cannot come next: [grammars, vocabulary]."""
    words = ~np.stack([each.allowed for each in grammars])
    return np.unpackbits(words.view(np.uint8), axis=1, count=vocabulary, bitorder="little").view(np.bool_)


def _source(response_format: Mapping[str, Json]) -> str:
    """Returns a response format as llguidance reads it."""
    kind = response_format["type"]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(cast(str, response_format["pattern"]))
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(cast(str, response_format["grammar"]))
    schema = response_format["schema"] if kind == "json_schema" else {"type": "object"}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": _WHITESPACE})


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"response_format: {reason.strip()}")
