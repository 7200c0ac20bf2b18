"""Cross-encoders: a classifier with one label reads the query and a document together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from sentence_transformers import CrossEncoder

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json
from millstream.worker.models.base import Prepared, Upcoming
from millstream.worker.models.kernels.prefetch import Prefetch, sent
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.loading import Folder, dtype_of, loaded, longest
from millstream.worker.models.loading.sharing import PROBES, QUERY, Filling, Precision, Sharing, Side, measured
from millstream.worker.models.reranking.options import RerankOptions, answer_each
from millstream.worker.models.reranking.pairs import (
    SAMPLE_OPTIONS,
    Activation,
    Prompts,
    TextPairs,
    pairs_of,
    sample,
    scored,
    settle,
)
from millstream.worker.models.reranking.prompts import chat_frame


class CrossEncoderModel:
    """One cross-encoder on one device. It gives what `CrossEncoder.predict` gives for the query and a document alone.

    So a score is what the model's own activation makes of its logit, a sigmoid where it names none; "raw" is the logit.
    """

    op = "rerank"
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: str) -> None:
        torch.set_num_threads(threads)
        encoder = loaded(CrossEncoder, folder.source, spec, device)
        self._encoder, self._model = encoder, cast(Any, encoder.model)
        _check_labels(self._model.config.num_labels, spec)
        self._tokenizer = cast(Any, encoder.tokenizer)
        self._modality = "text" if "text" in getattr(encoder[0], "modality_config", ("text",)) else "message"
        self._own = cast(Activation, encoder.activation_fn)
        self._truncate = truncate
        self._pairs = self._pairing(folder, spec)
        self._filling = Filling.of(self._tokenizer)
        self._prefetch = Prefetch(self._model.device, self._tensors, spec.backend)
        self._sharing = self._measured(
            forget(encoder), Precision.of(encoder, str(self._model.device.type), spec.backend)
        )
        self.fingerprint = folder.fingerprint(spec, dtype_of(encoder), "cross-encoder", type(self._own).__name__)
        self.limit = settle(self._pairs, self, spec.max_length)
        self.device_type, self.backend = str(self._model.device.type), spec.backend

    def _pairing(self, folder: Folder, spec: ModelSpec) -> TextPairs | Prompts:
        limit = spec.max_length or longest(self._tokenizer, self._model.config)
        if not self._tokenizer.chat_template:
            return TextPairs(self._tokenizer, limit, folder.prompt())
        frame = chat_frame(self._tokenizer, folder.prompt(), folder.chat_settings(), spec.model_name)
        return Prompts(self._tokenizer, limit, frame)

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._rows)

    def _rows(self, question: RerankOptions, documents: Sequence[str]) -> Sequence[Prepared | MillstreamError]:
        if question.instruction and isinstance(self._pairs, TextPairs):
            raise InvalidRequest("this reranker takes no instruction", hint="generative ones do")
        return self._pairs.rows(question, documents)

    def foresee(self, upcoming: Upcoming) -> None:
        self._prefetch.foresee(lambda: self._sharing.of_one_forward(upcoming()))

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        with torch.inference_mode():
            logits = self._sharing.in_groups(rows, lambda some: self._logits(self._prefetch.batch(some)))
            self._prefetch.launched()
            return scored(logits, pairs_of(rows), self._own)

    def _logits(self, features: dict[str, Any]) -> torch.Tensor:
        """[rows], by the library's own forward: it knows which inputs the model takes."""
        scores = self._encoder({**features, "modality": self._modality})["scores"]
        return cast(torch.Tensor, scores).reshape(len(scores))

    def _measured(self, upto: float, precision: Precision) -> Sharing:
        def padded(rows: Sequence[Prepared], side: Side) -> torch.Tensor:
            return self._logits(sent(self._padded(rows, side), self._model.device))

        made = self.prepare(PROBES, {"query": QUERY, "truncate": "end"})
        own: Side = "left" if self._tokenizer.padding_side == "left" else "right"
        rows = [row for row in made if isinstance(row, Prepared)]
        return measured(padded, rows, ("right", own), upto, precision)

    def _tensors(self, rows: Sequence[Prepared]) -> Mapping[str, torch.Tensor]:
        return self._padded(rows, self._sharing.side)

    def _padded(self, rows: Sequence[Prepared], side: Side) -> Mapping[str, torch.Tensor]:
        return self._filling.padded([pair.ids for pair in pairs_of(rows)], side)

    def samples(self, tokens: int) -> Sequence[Json]:
        return [sample(self._pairs, tokens)]


def _check_labels(labels: int, spec: ModelSpec) -> None:
    if labels != 1:
        raise ModelUnavailable(
            f"{spec.model_name!r} has {labels} labels; a reranker has one, the score",
            hint="give a cross-encoder with one label, such as cross-encoder/ms-marco-MiniLM-L6-v2",
        )
