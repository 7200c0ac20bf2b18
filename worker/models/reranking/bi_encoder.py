"""Embedding models as rerankers: how near a document's vector is to the query's."""

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
from millstream.worker.models.base import Prepared
from millstream.worker.models.embedding.encoder import Encoder, Text, Wish
from millstream.worker.models.loading.loading import Folder
from millstream.worker.models.loading.sharing import Features
from millstream.worker.models.reranking.options import RerankOptions, answer_each
from millstream.worker.models.reranking.pairs import SAMPLE_OPTIONS, too_long_query


@dataclass(slots=True, eq=False)
class _Pair:
    query: Text
    document: Text


class BiEncoderModel:
    """One dense embedding model on one device. It gives `similarity(encode_query(query), encode_document(document))`.

    That is the cosine, unless the model names another similarity. A row's tokens are its document's: a query is encoded
    once for all rows of a micro-batch that ask it.
    """

    op = "rerank"
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: str) -> None:
        self._encoder = Encoder(spec, device, threads, truncate, folder.source)
        self._model = cast(SentenceTransformer, self._encoder.model)
        self._truncate = truncate
        self._asking = self._wish("query", "none")
        self._answering = {how: self._wish("document", how) for how in ("none", "start", "end")}
        self.packs = self._encoder.packs
        self.fingerprint = self._encoder.fingerprint("bi-encoder", str(self._model.similarity_fn_name))
        self.limit = self._encoder.limit_of(self._answering["none"])
        self.device_type, self.backend = self._encoder.device_type, spec.backend

    def _wish(self, input_type: InputType, truncate: Truncate) -> Wish:
        return self._encoder.wish(EmbedOptions(truncate=truncate, input_type=input_type).json())

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._rows)

    def _rows(self, question: RerankOptions, documents: Sequence[str]) -> list[Prepared | MillstreamError]:
        if question.instruction or question.scores == "sigmoid":
            raise InvalidRequest(
                "this reranker compares vectors: it takes no instruction, and its scores are no logits",
                hint="leave instruction and scores out",
            )
        query = self._query(question.query)
        answering = self._answering[question.truncate]
        return [self._row(query, made) for made in self._encoder.prepare(documents, answering)]

    def _query(self, text: str) -> Text:
        """The query, ready to run. Raises its error: that of all its rows."""
        (query,) = self._encoder.prepare([text], self._asking)
        if isinstance(query, InputTooLong):
            raise too_long_query(self._encoder.tokens(text, self._asking), self._asking.way.reader.limit)
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
        asked = torch.from_numpy(self._encoder.run(list(queries.values())))
        documents = torch.from_numpy(self._encoder.run([pair.document for pair in pairs]))
        with torch.inference_mode():
            alike = self._model.similarity_pairwise(asked[[places[_ids(pair.query)] for pair in pairs]], documents)
            return cast(list[Json], alike.tolist())

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["a " * tokens]


def _ids(text: Text) -> tuple[int, ...]:
    return tuple(cast(Features, text.features)["input_ids"])
