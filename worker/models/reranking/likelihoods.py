"""Log-probabilities of chosen tokens of a causal language model, without the logits of the other tokens."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from millstream.broker.contract.errors import ModelUnavailable, described
from millstream.worker.models.loading.sharing import Side

log = logging.getLogger(__name__)

MOST_LOGITS = 2**24
"""Most logits (tokens times vocabulary) that are computed at once: 64 MiB in float32."""

_CHANGED = 4
"""Tokens at the end of a text that are changed, to see whether predictions before them change."""

_LEAK = 0.05
"""Relative difference of logits. Rounding causes less, in any dtype; a model that reads later tokens causes more."""


class Places(NamedTuple):
    """Tokens whose log-probability is computed, as int64 tensors [tokens], and their number in each row, [rows]."""

    row: torch.Tensor
    column: torch.Tensor
    """Column of the token before, at which the model predicts the token."""
    target: torch.Tensor
    """Id of the token."""
    counts: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, ends: Sequence[int], counts: Sequence[int]) -> Places:
        """Returns the last `counts` tokens before the columns `ends` of each row of `ids` [rows, longest]."""
        row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        spans = (torch.arange(end - count - 1, end - 1) for end, count in zip(ends, counts, strict=True))
        column = torch.cat(list(spans))
        return cls(row, column, ids[row, column + 1], torch.tensor(counts))


class Likelihoods:
    """Computes log-probabilities with one causal language model, in parts of at most MOST_LOGITS logits.

    The hidden states of the chosen tokens alone go through the output layer. If that is not how the model makes its
    logits, for example because it caps them, the model's own forward makes them for the last columns of all rows.
    """

    def __init__(self, model: Any, probe: Sequence[int], name: str) -> None:
        """Tries the model `name` on `probe`, the ids of a short text. Raises ModelUnavailable if it is not causal."""
        self._model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        ids = torch.tensor([probe], device=model.device)
        with torch.inference_mode():
            logits = self._own_logits(ids)
            self._check_causal(ids, logits, name)
            self._vocabulary = logits.shape[-1]
            self._has_plain_head = self._is_equal(ids, logits)
        self.sides: tuple[Side, ...] = ("right", "left") if self._has_plain_head else ("left",)
        """Sides at which rows may be padded. The last columns hold the chosen tokens only if padding is at the left."""

    def __call__(self, inputs: Mapping[str, torch.Tensor], places: Places) -> torch.Tensor:
        """Returns the log-probabilities of the tokens at `places`, float32 [tokens]."""
        width = inputs["input_ids"].shape[1]
        if self._has_plain_head:
            head, columns = self._model.get_output_embeddings(), self._states(inputs)
        else:
            keep = width - int(places.column.min())
            head, columns = (
                torch.nn.Identity(),
                self._model(**self._arguments({**inputs, "logits_to_keep": keep})).logits,
            )
        chosen = columns[places.row, places.column - (width - columns.shape[1])]
        size = max(1, MOST_LOGITS // self._vocabulary)
        parts = zip(torch.split(chosen, size), torch.split(places.target, size), strict=True)
        return -torch.cat([cross_entropy(head(part).float(), target, reduction="none") for part, target in parts])

    def _states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the hidden states behind the last layer, [rows, longest, hidden]."""
        states: torch.Tensor = self._model.base_model(**self._arguments(inputs))[0]
        return states

    def _arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns those of `inputs` that the model's forward takes; it keeps no cache of keys and values."""
        return {name: value for name, value in {**inputs, "use_cache": False}.items() if name in self._takes}

    def _own_logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(**self._arguments({"input_ids": ids})).logits
        return logits

    def _check_causal(self, ids: torch.Tensor, logits: torch.Tensor, name: str) -> None:
        """Raises ModelUnavailable if predictions depend on later tokens: a model could copy what it should predict."""
        other = ids.clone()
        other[:, -_CHANGED:] = ids[:, :1]
        difference = (self._own_logits(other) - logits)[0, :-_CHANGED].float().norm(dim=1).max()
        if float(difference / logits[0].float().norm(dim=1).max()) > _LEAK:
            raise ModelUnavailable(
                f"{name!r} is no causal language model: its predictions depend on later tokens",
                hint="give a model that was trained to predict the next token, or leave kind out",
            )

    def _is_equal(self, ids: torch.Tensor, logits: torch.Tensor) -> bool:
        """Returns whether the output layer makes `logits`, those of `ids`, of the hidden states."""
        try:
            made = self._model.get_output_embeddings()(self._states({"input_ids": ids}))
        except Exception as error:  # noqa: BLE001 - after any failure the model's own forward makes the logits
            log.debug("the output layer cannot run alone: %s", described(error))
            return False
        return torch.equal(made.float(), logits.float())
