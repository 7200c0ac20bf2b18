"""The facts of a model that its texts depend on: tokenizer, end tokens, context, defaults of sampling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.generation import GenerateOptions


class Sampling(NamedTuple):
    """How tokens are chosen: the options of a call, with the model's defaults in place of None."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Defaults(NamedTuple):
    """Values of the model's generation_config.json; None for those that it does not name.

    The defaults that transformers itself has beside that file, such as top_k 50, do not count.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, config: GenerationConfig) -> Defaults:
        return cls(
            bool(config.do_sample),
            config.temperature,
            config.top_p,
            config.top_k,
            config.min_p,
            config.repetition_penalty,
            config.max_new_tokens,
        )

    def resolve(self, options: GenerateOptions) -> Sampling:
        """Returns the options of a call, with defaults in place of None.

        Without a temperature, a model whose do_sample is not true takes the most probable token, as in transformers.
        """
        temperature = _first(options.temperature, _first(self.temperature, 1.0) if self.do_sample else 0.0)
        return Sampling(
            temperature,
            _first(options.top_p, self.top_p, 1.0),
            int(_first(options.top_k, self.top_k, 0)),
            _first(options.min_p, self.min_p, 0.0),
            _first(options.repetition_penalty, self.repetition_penalty, 1.0),
            options.presence_penalty,
            options.frequency_penalty,
        )


@dataclass(frozen=True, eq=False)
class TextSettings:
    """One model's settings. `vocabulary`: width of its logits. `context`: most tokens of prompt and text together.

    `eos`: the tokens that end a text. `special`: the tokens that have no text.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: Tokenizer
    vocabulary: int
    context: int
    eos: frozenset[int]
    special: frozenset[int]
    defaults: Defaults

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, vocabulary: int, context: int, generation: GenerationConfig
    ) -> TextSettings:
        """Returns the settings of a model. A text ends at the end tokens of its generation config and its tokenizer.

        Raises ModelUnavailable if the tokenizer is not one of the library tokenizers.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelUnavailable(
                f"the tokenizer, a {type(tokenizer).__name__}, has no tokenizer.json",
                hint="save it with AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) of transformers 5",
            )
        # Set by some tokenizer.json. Changing them at a call would fail while another thread uses the tokenizer.
        backend.no_truncation()
        backend.no_padding()
        # Too long prompts are refused with their length: a warning of the library would only fill the log.
        tokenizer.model_max_length = VERY_LARGE_INTEGER
        eos = {*_ids(generation.eos_token_id), *_ids(tokenizer.eos_token_id)}
        special = frozenset(number for number, token in backend.get_added_tokens_decoder().items() if token.special)
        return cls(tokenizer, backend, vocabulary, context, frozenset(eos), special, Defaults.of(generation))

    def token_text(self, token: int) -> str:
        """Returns the text of one token inside of a text: with the space before it, if it has one."""
        anchor = self.backend.decode(self._anchor, skip_special_tokens=False)
        text = self.backend.decode([*self._anchor, token], skip_special_tokens=False)
        return (
            text[len(anchor) :] if text.startswith(anchor) else self.backend.decode([token], skip_special_tokens=False)
        )

    @cached_property
    def _anchor(self) -> list[int]:
        return self.backend.encode("a", add_special_tokens=False).ids


def _ids(value: int | Iterable[int] | None) -> Iterable[int]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else value


def _first(*values: float | None) -> float:
    """Returns the first value that is not None."""
    return next(value for value in values if value is not None)
