"""Embedding models as rerankers: a score is the similarity of the query's vector and the document's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from sentence_transformers import SentenceTransformer

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.embedding import EmbedOptions, InputType, Truncate
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import RERANK
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.models.base import Prepared
from millstream.worker.models.embedding.encoder import Encoder, Plan, Text
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.sharing import Features
from millstream.worker.models.reranking.options import answer_each
from millstream.worker.models.reranking.pairs import SAMPLE_OPTIONS, too_long_query


@dataclass(slots=True, eq=False)
class _Pair:
    query: Text
    document: Text


class BiEncoderModel:
    """One dense embedding model on one device. Scores are `similarity(encode_query(query), encode_document(document))`.

    The similarity is the cosine, unless the model names another one. A row counts the tokens of its document only: each
    query is encoded once for all its rows of a micro-batch.
    """

    op = RERANK.op
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: Truncate) -> None:
        self._encoder = Encoder(spec, device, threads, truncate, folder.source)
        self._model = cast(SentenceTransformer, self._encoder.model)
        self._truncate = truncate
        self._query_plan = self._plan("query", "none")
        self._document_plans = {how: self._plan("document", how) for how in ("none", "start", "end")}
        self.packs = self._encoder.packs
        self.fingerprint = self._encoder.fingerprint("bi-encoder", str(self._model.similarity_fn_name))
        self.limit = self._encoder.limit_of(self._document_plans["none"])
        self.device_type, self.backend = self._encoder.device_type, spec.backend

    def _plan(self, input_type: InputType, truncate: Truncate) -> Plan:
        return self._encoder.plan(EmbedOptions(truncate=truncate, input_type=input_type).json())

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._rows)

    def _rows(self, question: RerankOptions, documents: Sequence[str]) -> list[Prepared | MillstreamError]:
        if question.instruction or question.scores == "sigmoid":
            raise InvalidRequest(
                "this reranker compares vectors: it takes no instruction, and its scores are no logits",
                hint="leave instruction and scores out",
            )
        query = self._query(question.query)
        plan = self._document_plans[question.truncate or self._truncate]
        return [self._row(query, made) for made in self._encoder.prepare(documents, plan)]

    def _query(self, text: str) -> Text:
        """Returns the query, ready to run. Raises its error, which all its rows get."""
        (query,) = self._encoder.prepare([text], self._query_plan)
        if isinstance(query, InputTooLong):
            raise too_long_query(self._encoder.tokens(text, self._query_plan), self._query_plan.group.reader.limit)
        if isinstance(query, MillstreamError):
            raise query
        return cast(Text, query)

    def _row(self, query: Text, document: Prepared | MillstreamError) -> Prepared | MillstreamError:
        if isinstance(document, MillstreamError):
            return document
        return Prepared(document.tokens, _Pair(query, cast(Text, document)), document.truncated)

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        pairs = [cast(_Pair, row.features) for row in rows]
        queries = {_ids(pair.query): pair.query for pair in pairs}
        places = {ids: at for at, ids in enumerate(queries)}
        query_vectors = torch.from_numpy(self._encoder.run(list(queries.values())))
        documents = torch.from_numpy(self._encoder.run([pair.document for pair in pairs]))
        with torch.inference_mode():
            scores = self._model.similarity_pairwise(
                query_vectors[[places[_ids(pair.query)] for pair in pairs]], documents
            )
            return cast(list[Json], scores.tolist())

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["a " * tokens]


def _ids(text: Text) -> tuple[int, ...]:
    return tuple(cast(Features, text.features)["input_ids"])
