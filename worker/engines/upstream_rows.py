"""Rows that a server answers many at a time: texts to embed, documents to score. Pure: no I/O."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from millstream.broker.contract.embedding import EmbedOptions, Truncate
from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.job import Encoded, Json, Vectors
from millstream.broker.contract.rerank import RerankOptions
from millstream.broker.contract.vectors import shaped
from millstream.worker.engines.upstream_wire import Call, Server, broken, objects
from millstream.worker.models.base import NOT_FINITE
from millstream.worker.scheduling.active_job import Outcome, Rows

UNIT = 1e-3
"""Difference of a vector's length from 1 up to which a model counts as one that gives unit vectors."""


@dataclass(slots=True, eq=False)
class Item:
    """One row: its text and options. `tries`, `strikes`: requests for it alone that failed, and that broke off."""

    text: str
    options: EmbedOptions | RerankOptions
    group: object = None
    part: object = None
    """Rows of one request have equal groups and parts. A request that failed is sent again in two parts."""
    tries: int = 0
    strikes: int = 0


def _items(rows: Rows) -> list[Item]:
    return [cast(Item, row.payload.features) for row in rows]


def _tei_truncation(truncate: Truncate | None) -> Mapping[str, Json]:
    """Returns the fields of a TEI request that say which end of a long text is cut, if any."""
    if truncate not in ("start", "end"):
        return {"truncate": False}
    return {"truncate": True, "truncation_direction": "Left" if truncate == "start" else "Right"}


class Embedding:
    """A request for the vectors of rows. `backend`: the routes of the server."""

    def __init__(self, rows: Rows, backend: str, model_name: str) -> None:
        self.rows = rows
        self._backend = backend
        self._model_name = model_name

    def call(self, server: Server) -> Call:
        items = _items(self.rows)
        options = cast(EmbedOptions, items[0].options)
        texts: list[Json] = [each.text for each in items]
        match self._backend:
            case "tei":
                body: dict[str, Json] = {"inputs": texts, **_tei_truncation(options.truncate)}
                if options.normalize is False:
                    body["normalize"] = False
                if options.input_type in ("query", "document"):
                    body["prompt_name"] = options.input_type
                return Call("/embed", body)
            case "ollama":
                truncate = options.truncate == "end"
                return Call("/api/embed", {"model": self._model_name, "input": texts, "truncate": truncate})
        return Call("/embeddings", {"model": self._model_name, "input": texts, "encoding_format": "base64"})

    def finish(self, answer: Json) -> Sequence[Outcome]:
        vectors = self._vectors(answer)
        note_tokens(self.rows, answer)
        finite = np.asarray(np.isfinite(vectors).all(axis=1))
        lengths = np.linalg.norm(vectors[finite], axis=1)
        gives_units = bool(len(lengths)) and bool((np.abs(lengths - 1) < UNIT).all())
        outcomes: list[Outcome] = []
        for at, item in enumerate(_items(self.rows)):
            options = cast(EmbedOptions, item.options)
            if not finite[at]:
                outcomes.append(ModelFailed(NOT_FINITE))
            elif options.dimensions and options.dimensions > vectors.shape[1]:
                outcomes.append(ModelFailed(f"dimensions={options.dimensions}, the model gives {vectors.shape[1]}"))
            else:
                one = shaped(vectors[at : at + 1], options.dimensions, options.unit(gives_units), options.encoding)
                outcomes.append(cast(Encoded, one[0]))
        return outcomes

    def _vectors(self, answer: Json) -> Vectors:
        """The vectors of an answer, float32 [rows, dim]. Raises Fault."""
        match self._backend:
            case "tei":
                found = answer
            case "ollama":
                found = answer.get("embeddings") if isinstance(answer, dict) else None
            case _:
                data = objects(answer.get("data") if isinstance(answer, dict) else None, "data")
                found = cast(Json, in_order(data, "embedding", len(self.rows)))
        if not isinstance(found, list) or len(found) != len(self.rows):
            raise broken(f"its answer has not one vector for each of {len(self.rows)} texts")
        try:
            vectors = np.stack([_vector(each) for each in found])
        except (TypeError, ValueError, OverflowError) as error:
            raise broken(f"its answer has a vector of another shape: {error}") from error
        if vectors.ndim != 2 or not vectors.shape[1]:
            raise broken("its answer has vectors without numbers")
        return vectors


def _vector(value: Json) -> Vectors:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), "<f4").astype(np.float32)
    # A number that float32 cannot hold becomes infinite, and its row fails for that.
    with np.errstate(over="ignore"):
        vector = np.asarray(value, np.float32)
    if vector.ndim != 1:
        raise ValueError("not one row of numbers")
    return vector


class Reranking:
    """A request for the scores of documents of one query."""

    def __init__(self, rows: Rows, backend: str, model_name: str) -> None:
        self.rows = rows
        self._backend = backend
        self._model_name = model_name

    def call(self, server: Server) -> Call:
        items = _items(self.rows)
        options = cast(RerankOptions, items[0].options)
        texts: list[Json] = [each.text for each in items]
        if self._backend == "tei":
            body: dict[str, Json] = {"query": options.query, "texts": texts, **_tei_truncation(options.truncate)}
            return Call("/rerank", body | {"raw_scores": options.scores == "raw"})
        return Call(
            "/rerank",
            {
                "model": self._model_name,
                "query": options.query,
                "documents": texts,
                "top_n": len(texts),
                "return_documents": False,
            },
        )

    def finish(self, answer: Json) -> Sequence[Outcome]:
        found = answer if self._backend == "tei" else answer.get("results") if isinstance(answer, dict) else None
        key = "score" if self._backend == "tei" else "relevance_score"
        scores = in_order(objects(found, "results"), key, len(self.rows))
        note_tokens(self.rows, answer)
        outcomes: list[Outcome] = []
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise broken("its answer has a score that is no number")
            outcomes.append(float(score) if math.isfinite(score) else ModelFailed(NOT_FINITE))
        return outcomes


def in_order(results: Sequence[Mapping[str, Json]], key: str, count: int) -> list[Json]:
    """Returns `key` of each result in the order of their `index`. Raises Fault unless each of `count` is there once."""
    by_index = {str(each.get("index", at)): each.get(key) for at, each in enumerate(results)}
    if len(results) != count or by_index.keys() != set(map(str, range(count))) or None in by_index.values():
        raise broken(f"its answer has not one {key} for each of {count} rows")
    return [by_index[str(at)] for at in range(count)]


def note_tokens(rows: Rows, answer: Json) -> None:
    """Gives the rows the tokens that the server counted, in proportion to their estimates, if it says them."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens", usage.get("prompt_tokens")) if isinstance(usage, dict) else None
    if isinstance(answer, dict) and total is None:
        total = answer.get("prompt_eval_count")
    if isinstance(total, bool) or not isinstance(total, int) or total <= 0:
        return
    estimates = sum(row.payload.tokens for row in rows)
    given, seen = 0, 0
    for row in rows:
        seen += row.payload.tokens
        share = round(total * seen / estimates) - given
        given += share
        row.payload.tokens = share
