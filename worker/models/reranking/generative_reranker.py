"""Language models as rerankers: how much more likely "yes" is than "no" as the next word of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.util import get_device_name
from transformers import AutoModelForCausalLM, AutoTokenizer

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.errors import MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json
from millstream.worker.models.base import Prepared, Upcoming
from millstream.worker.models.kernels.linear import prepack
from millstream.worker.models.kernels.prefetch import Prefetch, sent
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.loading import (
    LOAD_ERRORS,
    Folder,
    dtype_of,
    longest,
    model_kwargs,
    unavailable,
)
from millstream.worker.models.loading.sharing import PROBES, QUERY, Filling, Precision, Sharing, Side, measured
from millstream.worker.models.loading.weights import whole_weights
from millstream.worker.models.reranking.options import answer_each
from millstream.worker.models.reranking.pairs import SAMPLE_OPTIONS, Frame, Prompts, pairs_of, sample, scored, settle
from millstream.worker.models.reranking.prompts import chat_frame, qwen3_frame

_ACTIVATIONS = (torch.nn.Sigmoid, torch.nn.Identity, torch.nn.Tanh)


class GenerativeReranker:
    """One causal language model on one device. A score is the logit of "yes" less that of "no", through a sigmoid.

    A folder that sentence-transformers saved names its two tokens, its activation and its chat template; a model
    without that is asked in the words of Qwen3-Reranker.
    """

    op = "rerank"
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: str) -> None:
        torch.set_num_threads(threads)
        self._tokenizer, self._model = _load(folder, spec, device)
        self._filling = Filling.of(self._tokenizer)
        self._prefetch = Prefetch(self._model.device, lambda rows: self._padded(rows, "left"))
        self._takes = set(inspect.signature(self._model.forward).parameters)
        self._truncate = truncate
        judge = _judge(folder)
        self._yes, self._no = _answers(judge, self._tokenizer, spec.model_name)
        self._own = _activation(folder, spec.model_name)
        frame: Frame = qwen3_frame
        if judge is not None:
            frame = chat_frame(self._tokenizer, folder.prompt(), folder.chat_settings(), spec.model_name)
        self._pairs = Prompts(self._tokenizer, spec.max_length or longest(self._tokenizer, self._model.config), frame)
        self.fingerprint = folder.fingerprint(spec, dtype_of(self._model), "generative", type(self._own).__name__)
        self._sharing = self._measured(forget(self._model))
        self.limit = settle(self._pairs, self, spec.max_length)
        self.device_type, self.backend = str(self._model.device.type), spec.backend

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._pairs.rows)

    def foresee(self, upcoming: Upcoming) -> None:
        self._prefetch.foresee(lambda: self._sharing.of_one_forward(upcoming()))

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        with torch.inference_mode():
            logits = self._sharing.in_groups(rows, lambda some: self._logits(self._prefetch.batch(some)))
            self._prefetch.launched()
            yes, no = logits.float().unbind(1)
            return scored(yes - no, pairs_of(rows), self._own)

    def _logits(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Those of "yes" and of "no" as the next token, [rows, 2]; 0 for a "no" that does not count."""
        given = {**features, "logits_to_keep": 1, "use_cache": False}
        logits = self._model(**{name: value for name, value in given.items() if name in self._takes}).logits[:, -1]
        yes = logits[:, self._yes]
        no = torch.zeros_like(yes) if self._no is None else logits[:, self._no]
        return torch.stack([yes, no], dim=1)

    def _measured(self, upto: float) -> Sharing:
        def padded(rows: Sequence[Prepared], side: Side) -> torch.Tensor:
            return self._logits(sent(self._padded(rows, side), self._model.device))

        made = self.prepare(PROBES, {"query": QUERY, "truncate": "end"})
        rows = [row for row in made if isinstance(row, Prepared)]
        precision = Precision.of(self._model, str(self._model.device.type), "torch")
        return measured(padded, rows, ("left",), upto, precision)

    def _padded(self, rows: Sequence[Prepared], side: Side) -> Mapping[str, torch.Tensor]:
        """Padded at the left, each row ends in the last column, where the answer is read.

        Positions are given, and count a row's own tokens: models that learned them would read the padding's.
        """
        tensors = self._filling.padded([pair.ids for pair in pairs_of(rows)], side)
        return {**tensors, "position_ids": (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    def samples(self, tokens: int) -> Sequence[Json]:
        return [sample(self._pairs, tokens)]


def _judge(folder: Folder) -> Mapping[str, Any] | None:
    """What sentence-transformers' LogitScore reads, where it saved the model."""
    modules = folder.read("modules.json") or ()
    paths = [each["path"] for each in modules if each["type"].endswith("LogitScore")]
    return folder.read(f"{paths[0]}/config.json") if paths else None


def _answers(judge: Mapping[str, Any] | None, tokenizer: Any, name: str) -> tuple[int, int | None]:
    """The tokens of yes and of no; of some models yes alone counts."""
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
        raise ModelUnavailable(f"{name!r} names an activation {own!r}", hint=f"one of {', '.join(known)} can be run")
    return known[word]()


def _load(folder: Folder, spec: ModelSpec, device: str | None) -> tuple[Any, Any]:
    """Its tokenizer, and the model."""
    source = str(folder.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        with whole_weights(spec.model_name):
            model: Any = AutoModelForCausalLM.from_pretrained(source, **model_kwargs(spec), trust_remote_code=False)
        model.eval().to(get_device_name() if device in (None, "auto") else device)
        prepack(model)
        return tokenizer, model
    except LOAD_ERRORS as error:
        raise unavailable(error, spec, device) from error
