"""Tokenizes texts for a module, truncates them, and makes the tensors of a micro-batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import tokenizers
import torch
from transformers import PreTrainedTokenizerBase

from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.loading.sharing import Features, Padding, Side


class Reader(Protocol):
    """A tokenizer. `read`, `cut` and `prompt_tokens` run in the claimer's thread, `batch` in the main thread."""

    limit: int
    """Most tokens of a text, special tokens included."""

    special: int
    """Number of special tokens that each text gets."""

    side: Side
    """The side at which the tokenizer itself pads."""

    shares_any: bool
    """Whether texts of any lengths may always share a forward, because nothing is padded."""

    reads_empty: bool
    """Whether the module returns a vector for a text without tokens."""

    def read(self, texts: list[str]) -> list[Features]:
        """Returns the tokens of each text, not truncated, special tokens included."""
        ...

    def cut(self, text: str, tokens: Features, side: str, prompt: int) -> Features:
        """Returns the tokens of a text that is too long, truncated to the limit at `side`, "start" or "end".

        The first `prompt` tokens stay at either side.
        """
        ...

    def prompt_tokens(self, prompt: str) -> int:
        """Returns how many tokens `prompt` has at the start of a text, a special token before it included."""
        ...

    def batch(self, rows: list[Features], side: Side) -> Mapping[str, torch.Tensor]:
        """Returns the tensors that a module's forward takes, on the CPU, padded at `side`."""
        ...


def reader_of(module: Any, max_length: int | None, task: str | None) -> Reader:
    """Returns the reader for texts of `task` by `module`, a model's first. Raises ModelUnavailable if it has none."""
    tokenizer = getattr(module, "tokenizer", None)
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return BagReader(tokenizer, max_length)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        if getattr(module, "query_expansion", None) is not None:
            raise ModelUnavailable("the model pads its queries, as late-interaction models do", hint="choose another")
        if "message" in getattr(module, "modality_config", ()):
            raise ModelUnavailable("the model reads texts through a chat template", hint="choose another")
        settings = settings_of(module)
        own = getattr(module, f"{task}_length", None) or getattr(module, "max_seq_length", None)
        own = settings.pop("max_length", None) or own
        # An inference-free sparse model looks up each token in a table, so it has no special tokens.
        bare = type(module).__name__ == "SparseStaticEmbedding"
        if bare:
            settings["add_special_tokens"] = False
        return PaddedReader(tokenizer, int(max_length or own or tokenizer.model_max_length), settings, bare)
    raise ModelUnavailable(
        f"its module {type(module).__name__} reads texts with {type(tokenizer).__name__}",
        hint="only models with a tokenizer of transformers or tokenizers can run",
    )


_HARMLESS = frozenset({"padding", "padding_side", "pad_to_multiple_of", "return_tensors", "return_attention_mask"})
"""Tokenizer settings that only decide how a batch is padded; they are ignored."""

_USED = frozenset({"add_special_tokens", "max_length", "return_token_type_ids"})
"""Tokenizer settings that are passed on."""


def settings_of(module: Any) -> dict[str, Any]:
    """Returns the tokenizer settings of `module`: sentence-transformers keeps them in `processing_kwargs`.

    Raises ModelUnavailable if a setting is unknown.
    """
    kwargs = getattr(module, "processing_kwargs", None) or {}
    settings = {**(kwargs.get("text") or {}), **(kwargs.get("common") or {})}
    unknown = sorted(settings.keys() - _HARMLESS - _USED - {"truncation", "logits_to_keep"})
    if unknown:
        raise ModelUnavailable(
            f"its processing_kwargs set {', '.join(unknown)} for texts", hint=f"{', '.join(sorted(_USED))} are known"
        )
    return {name: value for name, value in settings.items() if name in _USED}


class PaddedReader:
    """A tokenizer of transformers, called with `settings`: texts are padded to the longest of a batch."""

    shares_any = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limit: int, settings: Mapping[str, Any], reads_empty: bool = False
    ) -> None:
        self._tokenizer = cast(Any, tokenizer)
        # verbose=False: no warning about long texts, which are truncated here or an error.
        self._settings = {**settings, "padding": False, "return_attention_mask": False, "verbose": False}
        self._with_special = bool(settings.get("add_special_tokens", True))
        self._padding = Padding.of(tokenizer)
        self.side: Side = "left" if self._tokenizer.padding_side == "left" else "right"
        self.limit, self.reads_empty = limit, reads_empty
        self.special = self._tokenizer.num_special_tokens_to_add() if self._with_special else 0

    def read(self, texts: list[str]) -> list[Features]:
        made = self._tokenizer(texts, truncation=False, **self._settings)
        return [{name: made[name][at] for name in made} for at in range(len(texts))]

    def cut(self, text: str, tokens: Features, side: str, prompt: int) -> Features:
        if side == "start" and prompt:
            return _without_middle(tokens, prompt, self.limit)
        # Safe without a lock: only this thread truncates, and padding, in the main thread, does not read the side.
        self._tokenizer.truncation_side = "left" if side == "start" else "right"
        return dict(self._tokenizer(text, truncation=True, max_length=self.limit, **self._settings))

    def prompt_tokens(self, prompt: str) -> int:
        if not prompt:
            return 0
        ids = self.read([prompt])[0]["input_ids"]
        closed = self._with_special and ids and ids[-1] in self._tokenizer.all_special_ids
        return min(len(ids) - bool(closed), self.limit)

    def batch(self, rows: list[Features], side: Side) -> Mapping[str, torch.Tensor]:
        return self._padding.pad(rows, side)


class BagReader:
    """A tokenizer of the library tokenizers, for bag-of-tokens models: no padding, no special tokens."""

    side: Side = "right"
    shares_any = reads_empty = True
    special = 0

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int | None) -> None:
        own = (tokenizer.truncation or {}).get("max_length")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.limit = int(max_length or own or sys.maxsize)

    def read(self, texts: list[str]) -> list[Features]:
        return [{"input_ids": read.ids} for read in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def cut(self, text: str, tokens: Features, side: str, prompt: int) -> Features:
        if side == "start":
            return _without_middle(tokens, prompt, self.limit)
        return {"input_ids": tokens["input_ids"][: self.limit]}

    def prompt_tokens(self, prompt: str) -> int:
        return min(len(self.read([prompt])[0]["input_ids"]), self.limit)

    def batch(self, rows: list[Features], side: Side) -> Mapping[str, torch.Tensor]:
        texts = [row["input_ids"] for row in rows]
        lengths = torch.tensor([0, *(len(text) for text in texts[:-1])])
        ids = torch.tensor([each for text in texts for each in text], dtype=torch.long)
        return {"input_ids": ids, "offsets": lengths.cumsum(0)}


def text_of(tokens: int, count: Callable[[str], int]) -> str:
    """Returns a text with about `tokens` tokens, at most that many, by `count`; "" if one word has more."""
    words = tokens
    while words > 0 and (counted := count(text := " ".join(["a"] * words))) > tokens:
        words = min(words - 1, words * tokens // counted)
    return text if words > 0 else ""


def _without_middle(tokens: Features, first: int, limit: int) -> Features:
    return {name: [*row[:first], *row[len(row) - (limit - first) :]] for name, row in tokens.items()}
