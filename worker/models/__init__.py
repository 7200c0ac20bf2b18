"""The models a worker can run. The only place that imports torch and the libraries on top of it."""

from __future__ import annotations

import os

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.base import Model, Prepared, packs
from millstream.worker.models.loading.source import handler_of

__all__ = ["Model", "Prepared", "load", "packs"]


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str = "") -> Model:
    """The model of `spec`, loaded. Raises ModelUnavailable. Torch is imported only by the types that need it.

    `folder` is where the code of a custom model is looked for, beside what is installed.
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

        # What torch and its like read as they are imported: all cores for each of several workers would be too many.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        handler = handler_of(spec)
        return CustomModel(load_handler(handler, folder), handler, spec.runtime, device)
    raise ModelUnavailable(
        f"service {spec.name!r}: this version has no worker for models of type {spec.model.type!r}",
        hint="embedding, reranker, custom and echo run today",
    )


def _missing(spec: ServiceSpec, error: ModuleNotFoundError) -> ModelUnavailable:
    return ModelUnavailable(
        f"service {spec.name!r} needs {error.name}, which is not installed",
        hint='pip install "millstream[worker]"',
    )
