"""Sentence-transformers embedding models: tokenised once, padded by us, one forward a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer

from millstream.broker.config import ModelSpec
from millstream.broker.errors import InputTooLong, InvalidRequest, MillstreamError
from millstream.broker.job import Json, Vectors
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.models.loading import DTYPES, LOAD_ERRORS, snapshot, unavailable
from millstream.worker.models.source import locate, weights_digest

# A worker logs one line when it is ready; bars of many processes only garble a terminal.
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class EmbeddingModel:
    """One dense embedding model on one device.

    `prepare` and `forward` give what `SentenceTransformer.encode` gives for the text alone: the same tokenizer, the
    model's own default prompt, its own pooling and normalisation.
    """

    op = "embed"
    sample_options = NO_OPTIONS

    def __init__(self, spec: ModelSpec, device: str | None, threads: int, truncate: str = "none") -> None:
        torch.set_num_threads(threads)
        source = locate(spec.model_name)
        self._model = _load(source, spec, device)
        self._tokenizer = cast(Any, self._model.tokenizer)
        self._limit = int(spec.max_length or self._model.max_seq_length or self._tokenizer.model_max_length)
        self._truncate = truncate
        self._prompt = self._model.prompts.get(self._model.default_prompt_name or "") or ""
        self._device = self._model.device
        self.fingerprint = self._fingerprint(source, spec.revision)

    def _fingerprint(self, source: Path | str, revision: str | None) -> str:
        folder = source if isinstance(source, Path) else snapshot(source, revision)
        weights = weights_digest(folder)[:16] if folder else str(source)
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        return f"{weights}{f'@{revision}' if revision else ''} {dtype} {self._model.get_embedding_dimension()}"

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        truncate = options.get("truncate", self._truncate)
        rows: list[Prepared | MillstreamError] = [
            InvalidRequest(f"not a string but {type(text).__name__}", hint="embed takes strings") for text in inputs
        ]
        texts = [(at, self._prompt + text) for at, text in enumerate(inputs) if isinstance(text, str)]
        if not texts:
            return rows
        # verbose: the tokenizer warns about long texts; here they are an error or cut.
        ids = self._tokenizer([text for _, text in texts], padding=False, truncation=False, verbose=False)["input_ids"]
        for (at, text), tokens in zip(texts, ids, strict=True):
            rows[at] = self._row(text, tokens, truncate)
        return rows

    def _row(self, text: str, tokens: list[int], truncate: Json) -> Prepared | MillstreamError:
        if len(tokens) <= self._limit:
            return Prepared(len(tokens), tokens)
        if truncate in ("start", "end"):
            cut = self._cut(text, truncate)
            return Prepared(len(cut), cut, truncated=True)
        return InputTooLong(
            f"{len(tokens)} tokens, the model reads {self._limit}", hint='shorten it, or pass truncate="end"'
        )

    def _cut(self, text: str, side: Json) -> list[int]:
        """The ids of `text` within the limit, special tokens kept, cut at `side`."""
        # Only this thread truncates; padding, in the runner's, does not read the side.
        self._tokenizer.truncation_side = "left" if side == "start" else "right"
        return cast(list[int], self._tokenizer(text, truncation=True, max_length=self._limit)["input_ids"])

    def forward(self, rows: Sequence[Prepared]) -> Vectors:
        batch = self._tokenizer.pad({"input_ids": [row.features for row in rows]}, return_tensors="pt")
        with torch.inference_mode():
            features = {name: tensor.to(self._device) for name, tensor in batch.items()}
            vectors = self._model(features)["sentence_embedding"]
            return cast(Vectors, vectors.to(torch.float32).cpu().numpy().astype(np.float32, copy=False))

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["a " * min(tokens, self._limit - self._tokenizer.num_special_tokens_to_add())]


def _load(source: Path | str, spec: ModelSpec, device: str | None) -> SentenceTransformer:
    kwargs: dict[str, Any] = {"torch_dtype": DTYPES[spec.dtype], "use_safetensors": True}
    try:
        return SentenceTransformer(
            str(source),
            device=None if device in (None, "auto") else device,
            revision=spec.revision,
            trust_remote_code=False,
            model_kwargs=kwargs,
        ).eval()
    except LOAD_ERRORS as error:
        raise unavailable(error, spec, device) from error
