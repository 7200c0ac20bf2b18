"""Embedding models as rerankers: how near a document's vector is to the query's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer

from millstream.broker.config import ModelSpec
from millstream.broker.errors import InvalidRequest, MillstreamError, ModelUnavailable
from millstream.broker.job import Json
from millstream.worker.models.base import Prepared
from millstream.worker.models.feed import sent
from millstream.worker.models.limits import settled, stretched
from millstream.worker.models.loading import Folder, dtype_of, loaded
from millstream.worker.models.pairs import SAMPLE_OPTIONS, too_long, too_long_query
from millstream.worker.models.question import Question, answer_each

Ids = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Pair:
    query: Ids
    document: Ids


class BiEncoderModel:
    """One dense embedding model on one device. It gives `similarity(encode_query(query), encode_document(document))`.

    That is the cosine, unless the model names another similarity. A row's tokens are its document's: a query is encoded
    once for all rows of a micro-batch that ask it.
    """

    op = "rerank"
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: str) -> None:
        torch.set_num_threads(threads)
        self._model = loaded(SentenceTransformer, folder.source, spec, device)
        if "message" in getattr(self._model[0], "modality_config", ()):
            raise ModelUnavailable(
                f"{spec.model_name!r} puts its texts into a chat template, which rerankers do not",
                hint="give an embedding model without one",
            )
        self._tokenizer = cast(Any, self._model.tokenizer)
        self._limit = int(spec.max_length or self._model.max_seq_length or self._tokenizer.model_max_length)
        self._truncate = truncate
        prompts = self._model.prompts
        self._query_prompt = prompts.get("query") or ""
        self._document_prompt = next((prompt for name in _DOCUMENT_PROMPTS if (prompt := prompts.get(name))), "")
        self.fingerprint = folder.fingerprint(
            spec, dtype_of(self._model), "bi-encoder", str(self._model.similarity_fn_name)
        )
        self.limit = settled(self._limit, self._forward_of, spec.max_length)
        self._limit = self.limit.tokens
        self.device_type, self.backend = str(self._model.device.type), spec.backend

    def _forward_of(self, tokens: int) -> torch.Tensor:
        (short,) = self._ids(["a"])
        with torch.inference_mode():
            return self._vectors([tuple(stretched(short, tokens))])

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._rows)

    def _rows(self, question: Question, documents: Sequence[str]) -> list[Prepared | MillstreamError]:
        if question.instruction or question.scores == "sigmoid":
            raise InvalidRequest(
                "this reranker compares vectors: it takes no instruction, and its scores are no logits",
                hint="leave instruction and scores out",
            )
        (query,) = self._ids([self._query_prompt + question.query])
        if len(query) > self._limit:
            raise too_long_query(len(query), self._limit)
        texts = [self._document_prompt + document for document in documents]
        return [self._row(query, text, ids, question) for text, ids in zip(texts, self._ids(texts), strict=True)]

    def _row(self, query: Ids, text: str, ids: Ids, question: Question) -> Prepared | MillstreamError:
        if len(ids) <= self._limit:
            return Prepared(len(ids), _Pair(query, ids))
        if question.truncate == "none":
            return too_long(len(ids), self._limit)
        # Only this thread truncates; padding, in the runner's, does not read the side.
        self._tokenizer.truncation_side = "left" if question.truncate == "start" else "right"
        (cut,) = self._ids([text], truncation=True, max_length=self._limit)
        return Prepared(len(cut), _Pair(query, cut), truncated=True)

    def _ids(self, texts: Sequence[str], truncation: bool = False, **options: object) -> list[Ids]:
        if not texts:
            return []
        # verbose: the tokenizer warns about long texts; here they are an error or cut.
        made = self._tokenizer(list(texts), padding=False, truncation=truncation, verbose=False, **options)
        return [tuple(ids) for ids in made["input_ids"]]

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        pairs = [cast(_Pair, row.features) for row in rows]
        queries = {query: at for at, query in enumerate(dict.fromkeys(pair.query for pair in pairs))}
        with torch.inference_mode():
            asked = self._vectors(list(queries))[[queries[pair.query] for pair in pairs]]
            documents = self._vectors([pair.document for pair in pairs])
            return cast(list[Json], self._model.similarity_pairwise(asked, documents).float().tolist())

    def _vectors(self, ids: Sequence[Ids]) -> torch.Tensor:
        """float32 [ids, dim]."""
        batch = self._tokenizer.pad({"input_ids": [list(each) for each in ids]}, return_tensors="pt")
        return cast(torch.Tensor, self._model(sent(batch, self._model.device))["sentence_embedding"]).float()

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["a " * tokens]


_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Where encode_document looks for one, in this order."""
