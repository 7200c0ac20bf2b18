"""Language models as rerankers: a score is how much more likely "yes" is than "no" as the next token of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import RERANK
from millstream.worker.models.base import Prepared, Upcoming
from millstream.worker.models.kernels.accelerate import accelerate
from millstream.worker.models.kernels.prefetch import Prefetch, to_device
from millstream.worker.models.loading.causal import load_causal
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.library import dtype_of, token_limit
from millstream.worker.models.loading.sharing import PROBES, QUERY, Padding, Precision, Sharing, Side, measure
from millstream.worker.models.reranking.options import answer_each
from millstream.worker.models.reranking.pairs import SAMPLE_OPTIONS, Frame, Prompts, pairs_of, sample, score, set_limit
from millstream.worker.models.reranking.prompts import chat_frame, qwen3_frame

_ACTIVATIONS = (torch.nn.Sigmoid, torch.nn.Identity, torch.nn.Tanh)


class GenerativeReranker:
    """One causal language model on one device. A score is the logit of "yes" minus that of "no", through a sigmoid.

    A folder that sentence-transformers saved names the two tokens, the activation and the chat template. Any other
    model gets the prompt of Qwen3-Reranker.
    """

    op = RERANK.op
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: Truncate) -> None:
        torch.set_num_threads(threads)
        self._tokenizer, self._model = load_causal(folder, spec, device)
        accelerate(self._model, spec)
        self._padding = Padding.of(self._tokenizer)
        self._prefetch = Prefetch(self._model.device, lambda rows: self._pad(rows, "left"))
        self._takes = set(inspect.signature(self._model.forward).parameters)
        self._truncate = truncate
        judge = _judge(folder)
        self._yes, self._no = _answers(judge, self._tokenizer, spec.model_name)
        self._own_activation = _activation(folder, spec.model_name)
        frame: Frame = qwen3_frame
        if judge is not None:
            frame = chat_frame(self._tokenizer, folder.prompt(), folder.chat_settings(), spec.model_name)
        self._pairs = Prompts(
            self._tokenizer, spec.max_length or token_limit(self._tokenizer, self._model.config), frame
        )
        self.fingerprint = folder.fingerprint(
            spec, dtype_of(self._model), "generative", type(self._own_activation).__name__
        )
        self._sharing = self._measure_sharing(forget(self._model))
        self.limit = set_limit(self._pairs, self, spec.max_length)
        self.device_type, self.backend = str(self._model.device.type), spec.backend

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._pairs.rows)

    def foresee(self, upcoming: Upcoming) -> None:
        self._prefetch.foresee(lambda: self._sharing.of_one_forward(upcoming()))

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        with torch.inference_mode():
            logits = self._sharing.run_in_groups(rows, lambda some: self._logits(self._prefetch.batch(some)))
            self._prefetch.make_next()
            yes, no = logits.float().unbind(1)
            return score(yes - no, pairs_of(rows), self._own_activation)

    def _logits(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logits of "yes" and "no" as the next token, [rows, 2]; 0 for "no" if the model has none."""
        inputs = {**features, "logits_to_keep": 1, "use_cache": False}
        logits = self._model(**{name: value for name, value in inputs.items() if name in self._takes}).logits[:, -1]
        yes = logits[:, self._yes]
        no = torch.zeros_like(yes) if self._no is None else logits[:, self._no]
        return torch.stack([yes, no], dim=1)

    def _measure_sharing(self, max_tokens: float) -> Sharing:
        def run_padded(rows: Sequence[Prepared], side: Side) -> torch.Tensor:
            return self._logits(to_device(self._pad(rows, side), self._model.device))

        made = self.prepare(PROBES, {"query": QUERY, "truncate": "end"})
        rows = [row for row in made if isinstance(row, Prepared)]
        precision = Precision.of(self._model, str(self._model.device.type), "torch")
        return measure(run_padded, rows, ("left",), max_tokens, precision)

    def _pad(self, rows: Sequence[Prepared], side: Side) -> Mapping[str, torch.Tensor]:
        """Returns the padded tensors. Padding is at the left: the logits are read in the last column.

        `position_ids` count the tokens of each row without padding: models with learned positions would count padding.
        """
        tensors = self._padding.pad([pair.ids for pair in pairs_of(rows)], side)
        return {**tensors, "position_ids": (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    def samples(self, tokens: int) -> Sequence[Json]:
        return [sample(self._pairs, tokens)]


def _judge(folder: Folder) -> Mapping[str, Any] | None:
    """Returns the settings of sentence-transformers' LogitScore; None if it did not save the model."""
    modules = folder.read("modules.json") or ()
    paths = [each["path"] for each in modules if each["type"].endswith("LogitScore")]
    return folder.read(f"{paths[0]}/config.json") if paths else None


def _answers(judge: Mapping[str, Any] | None, tokenizer: Any, name: str) -> tuple[int, int | None]:
    """Returns the token ids of "yes" and "no"; None for "no" if the model scores by "yes" alone."""
    if judge is not None:
        return int(judge["true_token_id"]), judge.get("false_token_id")
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    if {yes, no} & {None, tokenizer.unk_token_id}:
        raise ModelUnavailable(
            f'the vocabulary of {name!r} has no "yes" and "no"', hint="give a model trained as a reranker"
        )
    return yes, no


def _activation(folder: Folder, name: str) -> torch.nn.Module:
    own = folder.settings().get("activation_fn") or "torch.nn.Sigmoid"
    known: dict[str, type[torch.nn.Module]] = {each.__name__: each for each in _ACTIVATIONS}
    word = own.rpartition(".")[2]
    if word not in known:
        raise ModelUnavailable(f"{name!r} names an activation {own!r}", hint=f"one of {', '.join(known)} can run")
    return known[word]()
