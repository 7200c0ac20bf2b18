"""Models that a worker can run. Only this package imports torch and the model libraries."""

from __future__ import annotations

import os

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.base import Model, Prepared, packs
from millstream.worker.models.loading.source import handler_of

__all__ = ["Model", "Prepared", "load", "packs"]


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str = "") -> Model:
    """Returns the loaded model of `spec`. Raises ModelUnavailable if it cannot be loaded.

    Only the types embedding and reranker import torch. The code of a custom model is searched in the installed
    packages, then in `folder`.
    """
    if spec.model.type == "echo":
        from millstream.worker.models.echo import EchoModel

        return EchoModel(spec.model.model_name, spec.model.max_length)
    if spec.model.type == "embedding":
        try:
            from millstream.worker.models.embedding.embedding import EmbeddingModel
        except ModuleNotFoundError as error:
            raise _missing(spec, error) from None
        return EmbeddingModel(spec.model, device, threads, spec.runtime.truncate)
    if spec.model.type == "reranker":
        try:
            from millstream.worker.models.reranking.reranker import load_reranker
        except ModuleNotFoundError as error:
            raise _missing(spec, error) from None
        return load_reranker(spec.model, device, threads, spec.runtime.truncate)
    if spec.model.type == "custom":
        from millstream.worker.models.custom import CustomModel, load_handler

        # torch and similar libraries read it at import. Without it, each of several workers would use all cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        handler = handler_of(spec)
        return CustomModel(load_handler(handler, folder), handler, spec.runtime, device)
    raise ModelUnavailable(
        f"service {spec.name!r}: this version cannot run models of type {spec.model.type!r}",
        hint="use type embedding, reranker, custom or echo",
    )


def _missing(spec: ServiceSpec, error: ModuleNotFoundError) -> ModelUnavailable:
    return ModelUnavailable(
        f"service {spec.name!r} needs {error.name}, which is not installed",
        hint='pip install "millstream[worker]"',
    )
