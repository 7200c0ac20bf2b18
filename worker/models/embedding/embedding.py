"""Runs embedding models of sentence-transformers, dense and sparse: one forward for rows of any options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
from sentence_transformers import SparseEncoder

from millstream.broker.config.load import ModelSpec, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed
from millstream.broker.contract.job import Json, Vectors
from millstream.broker.contract.operations import EMBED
from millstream.broker.contract.vectors import shaped
from millstream.worker.models.base import NO_OPTIONS, NOT_FINITE, Prepared, Result, Upcoming
from millstream.worker.models.embedding.encoder import Encoder, Plan, Text


class EmbeddingModel:
    """One embedding model on one device.

    An answer is what the model's own `encode`, `encode_query` or `encode_document` returns for the text alone. A model
    whose settings say SparseEncoder answers {"indices": [...], "values": [...]}, sorted by index.
    """

    op = EMBED.op
    sample_options = NO_OPTIONS

    def __init__(self, spec: ModelSpec, device: str | None, threads: int, truncate: str = "none") -> None:
        self._encoder = Encoder(spec, device, threads, truncate)
        model = self._encoder.model
        self.packs = self._encoder.packs
        self.limit = self._encoder.limit
        self.device_type, self.backend = self._encoder.device_type, spec.backend
        self._sparse = isinstance(model, SparseEncoder)
        self._dimension = int(model.get_embedding_dimension() or 0)
        self._gives_units = type(list(model.modules())[-1]).__name__ == "Normalize" and not self._encoder.own_cut
        self._most_active = getattr(model, "max_active_dims", None)
        # Not the dimension: the library knows that of sparse vectors only after its first forward.
        self.fingerprint = self._encoder.fingerprint("sparse" if self._sparse else str(self._dimension))

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        try:
            plan = self._encoder.plan(options)
            self._check(plan)
        except InvalidRequest as error:
            return [error] * len(inputs)
        return self._encoder.prepare(inputs, plan)

    def _check(self, plan: Plan) -> None:
        options = plan.options
        if self._sparse and (options.dimensions, options.normalize, options.encoding) != (None, None, "float32"):
            raise InvalidRequest("the model's vectors are sparse", hint="leave dimensions, normalize and encoding out")
        if options.dimensions and options.dimensions > self._dimension:
            raise InvalidRequest(
                f"dimensions={options.dimensions}, the model gives {self._dimension}",
                hint=f"pass dimensions of at most {self._dimension}",
            )

    def foresee(self, upcoming: Upcoming) -> None:
        self._encoder.foresee(upcoming)

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Result]:
        vectors = self._encoder.run(rows)
        if self._sparse:
            return list(self._sparse_rows(vectors))
        plans = {row.plan for row in cast(Sequence[Text], rows)}
        return vectors if plans == {self._encoder.plain} else self._shape(cast(Sequence[Text], rows), vectors)

    def _shape(self, rows: Sequence[Text], vectors: Vectors) -> list[Result]:
        results: list[Result] = list(vectors)
        for plan in {row.plan for row in rows}:
            options = plan.options
            places = [at for at, row in enumerate(rows) if row.plan is plan]
            some = shaped(vectors[places], options.dimensions, options.unit(self._gives_units), options.encoding)
            for at, result in zip(places, some, strict=True):
                results[at] = result
        # Checks the vectors before encoding: an encoded vector, such as a binary one, does not show a NaN.
        for at in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
            results[at] = ModelFailed(NOT_FINITE)
        return results

    def _sparse_rows(self, vectors: Vectors) -> Iterator[Result]:
        for vector in vectors:
            if not np.isfinite(vector).all():
                yield ModelFailed(NOT_FINITE)
                continue
            (active,) = np.nonzero(vector)
            if self._most_active is not None and len(active) > self._most_active:
                strongest = np.argsort(-np.abs(vector[active]), kind="stable")[: self._most_active]
                active = np.sort(active[strongest])
            indices, values = cast(tuple[Json, Json], (active.tolist(), vector[active].tolist()))
            yield {"indices": indices, "values": values}

    def samples(self, tokens: int) -> Sequence[Json]:
        return self._encoder.samples(tokens)


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> EmbeddingModel:
    """Returns the loaded embedding model of `spec`. Raises ModelUnavailable."""
    return EmbeddingModel(spec.model, device, threads, spec.runtime.truncate)
