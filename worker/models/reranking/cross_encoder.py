"""Cross-encoders: classifiers with one label that read the query and a document together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from sentence_transformers import CrossEncoder

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import RERANK
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.models.base import Prepared, Upcoming
from millstream.worker.models.kernels.accelerate import accelerate
from millstream.worker.models.kernels.prefetch import Prefetch, to_device
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.library import dtype_of, load_model, token_limit
from millstream.worker.models.loading.sharing import PROBES, QUERY, Padding, Precision, Sharing, Side, measure
from millstream.worker.models.reranking.options import answer_each
from millstream.worker.models.reranking.pairs import (
    SAMPLE_OPTIONS,
    Activation,
    Prompts,
    TextPairs,
    pairs_of,
    sample,
    score,
    set_limit,
)
from millstream.worker.models.reranking.prompts import chat_frame


class CrossEncoderModel:
    """One cross-encoder on one device. Scores are what `CrossEncoder.predict` returns for the query and a document.

    So a score is the logit through the model's own activation, a sigmoid if it names none. A "raw" score is the logit.
    """

    op = RERANK.op
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: Truncate) -> None:
        torch.set_num_threads(threads)
        encoder = load_model(CrossEncoder, folder.source, spec, device)
        accelerate(encoder, spec)
        self._encoder, self._model = encoder, cast(Any, encoder.model)
        _check_labels(self._model.config.num_labels, spec)
        self._tokenizer = cast(Any, encoder.tokenizer)
        self._modality = "text" if "text" in getattr(encoder[0], "modality_config", ("text",)) else "message"
        self._own_activation = cast(Activation, encoder.activation_fn)
        self._truncate = truncate
        self._pairs = self._pairing(folder, spec)
        self._padding = Padding.of(self._tokenizer)
        self._prefetch = Prefetch(self._model.device, self._tensors, spec.backend)
        self._sharing = self._measure_sharing(
            forget(encoder), Precision.of(encoder, str(self._model.device.type), spec.backend)
        )
        self.fingerprint = folder.fingerprint(
            spec, dtype_of(encoder), "cross-encoder", type(self._own_activation).__name__
        )
        self.limit = set_limit(self._pairs, self, spec.max_length)
        self.device_type, self.backend = str(self._model.device.type), spec.backend

    def _pairing(self, folder: Folder, spec: ModelSpec) -> TextPairs | Prompts:
        limit = spec.max_length or token_limit(self._tokenizer, self._model.config)
        if not self._tokenizer.chat_template:
            return TextPairs(self._tokenizer, limit, folder.prompt())
        frame = chat_frame(self._tokenizer, folder.prompt(), folder.chat_settings(), spec.model_name)
        return Prompts(self._tokenizer, limit, frame)

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._rows)

    def _rows(self, question: RerankOptions, documents: Sequence[str]) -> Sequence[Prepared | MillstreamError]:
        if question.instruction and isinstance(self._pairs, TextPairs):
            raise InvalidRequest(
                "this reranker takes no instruction", hint="leave it out; generative rerankers take one"
            )
        return self._pairs.rows(question, documents)

    def foresee(self, upcoming: Upcoming) -> None:
        self._prefetch.foresee(lambda: self._sharing.of_one_forward(upcoming()))

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        with torch.inference_mode():
            logits = self._sharing.run_in_groups(rows, lambda some: self._logits(self._prefetch.batch(some)))
            self._prefetch.make_next()
            return score(logits, pairs_of(rows), self._own_activation)

    def _logits(self, features: dict[str, Any]) -> torch.Tensor:
        """Returns logits [rows], by the library's own forward, which knows the inputs of the model."""
        scores = self._encoder({**features, "modality": self._modality})["scores"]
        return cast(torch.Tensor, scores).reshape(len(scores))

    def _measure_sharing(self, max_tokens: float, precision: Precision) -> Sharing:
        def run_padded(rows: Sequence[Prepared], side: Side) -> torch.Tensor:
            return self._logits(to_device(self._pad(rows, side), self._model.device))

        made = self.prepare(PROBES, {"query": QUERY, "truncate": "end"})
        own: Side = "left" if self._tokenizer.padding_side == "left" else "right"
        rows = [row for row in made if isinstance(row, Prepared)]
        return measure(run_padded, rows, ("right", own), max_tokens, precision)

    def _tensors(self, rows: Sequence[Prepared]) -> Mapping[str, torch.Tensor]:
        return self._pad(rows, self._sharing.side)

    def _pad(self, rows: Sequence[Prepared], side: Side) -> Mapping[str, torch.Tensor]:
        return self._padding.pad([pair.ids for pair in pairs_of(rows)], side)

    def samples(self, tokens: int) -> Sequence[Json]:
        return [sample(self._pairs, tokens)]


def _check_labels(labels: int, spec: ModelSpec) -> None:
    if labels != 1:
        raise ModelUnavailable(
            f"{spec.model_name!r} has {labels} labels; a reranker has one, the score",
            hint="give a cross-encoder with one label, such as cross-encoder/ms-marco-MiniLM-L6-v2",
        )
