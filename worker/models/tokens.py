"""How a module reads texts: their token ids, what they are cut to, and the tensors of a micro-batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import tokenizers
import torch
from transformers import PreTrainedTokenizerBase

from millstream.broker.errors import ModelUnavailable

Ids = list[int]


class Reader(Protocol):
    """A tokenizer. `read`, `cut` and `prompt_tokens` run in the claimer's thread, `batch` in the main one."""

    limit: int
    """The most tokens of a text, special ones included."""

    special: int
    """Special tokens of each text."""

    def read(self, texts: list[str]) -> list[Ids]:
        """The ids of each text, uncut, special ones included."""
        ...

    def cut(self, text: str, ids: Ids, side: str, prompt: int) -> Ids:
        """The ids of a text that is too long, without what is beyond the limit at `side`, "start" or "end".

        Its first `prompt` ids are kept either way.
        """
        ...

    def prompt_tokens(self, prompt: str) -> int:
        """How many ids at the start of a text are there for the sake of `prompt`, a special one before it included."""
        ...

    def batch(self, rows: list[Ids]) -> Mapping[str, torch.Tensor]:
        """What a module's forward takes, on the CPU."""
        ...


def reader_of(module: Any, max_length: int | None, task: str | None) -> Reader:
    """How `module`, a model's first one, reads texts of `task`. Raises ModelUnavailable for an unknown kind."""
    tokenizer = getattr(module, "tokenizer", None)
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return BagReader(tokenizer, max_length)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        if getattr(module, "query_expansion", None) is not None:
            raise ModelUnavailable("the model pads its queries, as late-interaction models do", hint="choose another")
        if "message" in getattr(module, "modality_config", ()):
            raise ModelUnavailable("the model reads texts through a chat template", hint="choose another")
        own = getattr(module, f"{task}_length", None) or getattr(module, "max_seq_length", None)
        # The words of an inference-free sparse model are looked up as they are.
        bare = type(module).__name__ == "SparseStaticEmbedding"
        return PaddedReader(tokenizer, int(max_length or own or tokenizer.model_max_length), not bare)
    raise ModelUnavailable(
        f"its module {type(module).__name__} reads texts with {type(tokenizer).__name__}",
        hint="models with a tokenizer of transformers or tokenizers run",
    )


class PaddedReader:
    """A tokenizer of transformers: texts are padded to the longest of a batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int, with_special: bool) -> None:
        self._tokenizer = cast(Any, tokenizer)
        self._with_special = with_special
        self.limit = limit
        self.special = self._tokenizer.num_special_tokens_to_add() if with_special else 0

    def read(self, texts: list[str]) -> list[Ids]:
        # verbose: the tokenizer warns about long texts; here they are an error or cut.
        read = self._tokenizer(
            texts, padding=False, truncation=False, verbose=False, add_special_tokens=self._with_special
        )
        return cast(list[Ids], read["input_ids"])

    def cut(self, text: str, ids: Ids, side: str, prompt: int) -> Ids:
        if side == "start" and prompt:
            return _without_middle(ids, prompt, self.limit)
        # Only this thread truncates; padding, in the runner's, does not read the side.
        self._tokenizer.truncation_side = "left" if side == "start" else "right"
        cut = self._tokenizer(
            text, truncation=True, max_length=self.limit, verbose=False, add_special_tokens=self._with_special
        )
        return cast(Ids, cut["input_ids"])

    def prompt_tokens(self, prompt: str) -> int:
        if not prompt:
            return 0
        (ids,) = self.read([prompt])
        closed = self._with_special and ids and ids[-1] in self._tokenizer.all_special_ids
        return min(len(ids) - bool(closed), self.limit)

    def batch(self, rows: list[Ids]) -> Mapping[str, torch.Tensor]:
        return cast(Mapping[str, torch.Tensor], self._tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


class BagReader:
    """A bare tokenizer: each text is a bag of tokens, nothing is padded, no token is special."""

    special = 0

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int | None) -> None:
        own = (tokenizer.truncation or {}).get("max_length")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.limit = int(max_length or own or sys.maxsize)

    def read(self, texts: list[str]) -> list[Ids]:
        return [read.ids for read in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def cut(self, text: str, ids: Ids, side: str, prompt: int) -> Ids:
        return _without_middle(ids, prompt, self.limit) if side == "start" else ids[: self.limit]

    def prompt_tokens(self, prompt: str) -> int:
        return min(len(self.read([prompt])[0]), self.limit)

    def batch(self, rows: list[Ids]) -> Mapping[str, torch.Tensor]:
        lengths = torch.tensor([0, *(len(row) for row in rows[:-1])])
        ids = torch.tensor([each for row in rows for each in row], dtype=torch.long)
        return {"input_ids": ids, "offsets": lengths.cumsum(0)}


def text_of(tokens: int, count: Callable[[str], int]) -> str:
    """A text with about `tokens` tokens, and never more, as `count` counts them; "" if one word has more."""
    words = tokens
    while words > 0 and (counted := count(text := " ".join(["a"] * words))) > tokens:
        words = min(words - 1, words * tokens // counted)
    return text if words > 0 else ""


def _without_middle(ids: Ids, first: int, limit: int) -> Ids:
    return ids[:first] + ids[len(ids) - (limit - first) :]
