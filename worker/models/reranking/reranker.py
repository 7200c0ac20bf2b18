"""Loads a reranker: config.yaml or the model's own files decide which of four kinds it is."""

from __future__ import annotations

import transformers

from millstream.broker.config.load import ModelSpec, ServiceSpec
from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.operations import RERANK
from millstream.worker.models.base import Model
from millstream.worker.models.loading.fetch import fetch_folder
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.library import LOAD_ERRORS, load_error
from millstream.worker.models.reranking.bi_encoder import BiEncoderModel
from millstream.worker.models.reranking.cross_encoder import CrossEncoderModel
from millstream.worker.models.reranking.generative_reranker import GenerativeReranker
from millstream.worker.models.reranking.query_likelihood import QueryLikelihood

# Progress bars of several processes garble a terminal; a worker logs one line when it is ready.
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

Reranker = type[CrossEncoderModel] | type[BiEncoderModel] | type[GenerativeReranker] | type[QueryLikelihood]

_OF_ARCHITECTURE: dict[str, Reranker] = {
    "ForSequenceClassification": CrossEncoderModel,
    "ForCausalLM": GenerativeReranker,
    "LMHeadModel": GenerativeReranker,
}
_OF_MODULES: dict[tuple[str, ...], Reranker] = {
    ("Transformer",): CrossEncoderModel,
    ("Transformer", "LogitScore"): GenerativeReranker,
}


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> Model:
    """Returns the loaded reranker of `spec`. Raises ModelUnavailable."""
    return load_reranker(spec.model, device, threads, spec.runtime.truncate)


def load_reranker(spec: ModelSpec, device: str | None, threads: int, truncate: Truncate = "none") -> Model:
    """Returns the loaded reranker of `spec`. Raises ModelUnavailable.

    A folder with modules.json was saved by sentence-transformers, as one of three kinds: a cross-encoder with a
    classifier, one with a language model that answers yes or no, or an embedding model, which ranks by similarity. For
    any other folder the architecture in config.json decides: a sequence classifier is a cross-encoder, a causal
    language model a generative reranker. With `kind: query_likelihood` config.json must name a causal language model.
    """
    folder = Folder(fetch_folder(spec, RERANK.organization), spec.revision)
    try:
        kind = _kind(folder) if spec.kind == "auto" else _chosen_kind(folder, spec)
    except LOAD_ERRORS as error:
        raise load_error(error, spec, device) from error
    if kind is None:
        raise ModelUnavailable(
            f"{spec.model_name!r} is no reranker that can be run here",
            hint="give a cross-encoder, a sentence-transformers embedding model, or a causal language model",
        )
    if kind in (GenerativeReranker, QueryLikelihood) and spec.backend != "torch":
        raise ModelUnavailable(f"{spec.model_name!r} is a language model", hint="it runs with backend torch only")
    return kind(folder, spec, device, threads, truncate)


def _kind(folder: Folder) -> Reranker | None:
    modules = folder.read("modules.json")
    if modules is None:
        return _kind_of_architecture(_architecture(folder))
    names = tuple(str(module["type"]).rpartition(".")[2] for module in modules)
    model_type = folder.settings().get("model_type", "SentenceTransformer")
    if model_type == "CrossEncoder":
        return _OF_MODULES.get(names)
    return BiEncoderModel if model_type == "SentenceTransformer" else None


def _chosen_kind(folder: Folder, spec: ModelSpec) -> Reranker:
    """Returns the kind that `spec` names. Raises ModelUnavailable if the model is no causal language model."""
    architecture = _architecture(folder)
    if _kind_of_architecture(architecture) is not GenerativeReranker:
        raise ModelUnavailable(
            f"{spec.model_name!r} is no causal language model but {architecture or 'of no known architecture'}, so it"
            f" cannot be of kind {spec.kind}",
            hint="give a model whose config.json names an architecture ...ForCausalLM, or leave kind out",
        )
    return QueryLikelihood


def _architecture(folder: Folder) -> str:
    """Returns the architecture that config.json names; empty if it names none."""
    return str(((folder.read("config.json") or {}).get("architectures") or [""])[0])


def _kind_of_architecture(architecture: str) -> Reranker | None:
    return next((kind for end, kind in _OF_ARCHITECTURE.items() if architecture.endswith(end)), None)
