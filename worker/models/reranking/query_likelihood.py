"""Language models as rerankers: a score is how likely the query is as a question that the document answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType

import torch

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import RERANK
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.models.base import Prepared, Upcoming
from millstream.worker.models.kernels.accelerate import accelerate
from millstream.worker.models.kernels.prefetch import Prefetch, to_device
from millstream.worker.models.loading.causal import load_causal
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.library import dtype_of, token_limit
from millstream.worker.models.loading.sharing import PROBES, QUERY, Padding, Precision, Sharing, Side, measure
from millstream.worker.models.reranking.likelihoods import Likelihoods, Places
from millstream.worker.models.reranking.options import answer_each
from millstream.worker.models.reranking.pairs import Prompts, pairs_of, sample, set_limit
from millstream.worker.models.reranking.prompts import likelihood_frame


class QueryLikelihood:
    """One causal language model on one device. A score is the mean log-probability of the query's tokens, at most 0.

    The query stands behind the document, so each of its tokens is predicted from the document and the tokens before it.
    """

    op = RERANK.op
    # A query of usual length: each of its tokens needs logits, so the warm-up must not measure a query of one token.
    sample_options: Mapping[str, Json] = MappingProxyType({**RERANK.example, "truncate": "end"})

    def __init__(self, folder: Folder, spec: ModelSpec, device: str | None, threads: int, truncate: Truncate) -> None:
        torch.set_num_threads(threads)
        self._tokenizer, self._model = load_causal(folder, spec, device)
        accelerate(self._model, spec)
        self._padding = Padding.of(self._tokenizer)
        self._bos = _bos(self._tokenizer)
        self._truncate = truncate
        self._pairs = Prompts(
            self._tokenizer, spec.max_length or token_limit(self._tokenizer, self._model.config), self._frame
        )
        max_tokens = forget(self._model)
        probe = self._pairs.whole(RerankOptions(QUERY), PROBES[0])
        self._likelihoods = Likelihoods(self._model, probe, spec.model_name)
        self._sharing = self._measure_sharing(max_tokens)
        self._prefetch = Prefetch(self._model.device, lambda rows: self._pad(rows, self._sharing.side))
        self.fingerprint = folder.fingerprint(spec, dtype_of(self._model), "query-likelihood")
        self.limit = set_limit(self._pairs, self, spec.max_length)
        self.device_type, self.backend = str(self._model.device.type), spec.backend

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return answer_each(inputs, options, self._truncate, self._rows)

    def _rows(self, question: RerankOptions, documents: Sequence[str]) -> Sequence[Prepared | MillstreamError]:
        if question.scores == "sigmoid":
            raise InvalidRequest("scores of this reranker are log-probabilities, no logits", hint="leave scores out")
        query_tokens = self._query_tokens(question)
        if not query_tokens:
            raise InvalidRequest("the query has no token, and this reranker scores its tokens", hint='query="..."')
        rows = self._pairs.rows(question, documents)
        for pair in pairs_of([row for row in rows if isinstance(row, Prepared)]):
            pair.query_tokens = query_tokens
        return rows

    def _query_tokens(self, question: RerankOptions) -> int:
        """Returns the number of tokens at the end of a row that are there because of the query."""
        without = self._pairs.whole(question._replace(query=""), "")
        ids = self._pairs.whole(question, "")
        common = takewhile(lambda pair: pair[0] == pair[1], zip(ids, without, strict=False))
        return len(ids) - sum(1 for _ in common)

    def _frame(self, question: RerankOptions) -> tuple[str, str]:
        head, tail = likelihood_frame(question)
        return self._bos + head, tail

    def foresee(self, upcoming: Upcoming) -> None:
        self._prefetch.foresee(lambda: self._sharing.of_one_forward(upcoming()))

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        with torch.inference_mode():
            scores = self._sharing.run_in_groups(rows, lambda some: self._scores(self._prefetch.batch(some)))
            self._prefetch.make_next()
            found: list[Json] = scores.tolist()
            return found

    def _scores(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the mean log-probability of each row's query, [rows]."""
        inputs = {name: tensor for name, tensor in features.items() if name not in Places._fields}
        places = Places(**{name: features[name] for name in Places._fields})
        found = self._likelihoods(inputs, places)
        return found.new_zeros(len(places.counts)).index_add_(0, places.row, found) / places.counts

    def _measure_sharing(self, max_tokens: float) -> Sharing:
        def run_padded(rows: Sequence[Prepared], side: Side) -> torch.Tensor:
            return self._scores(to_device(self._pad(rows, side), self._model.device))

        made = self.prepare(PROBES, {"query": QUERY, "truncate": "end"})
        rows = [row for row in made if isinstance(row, Prepared)]
        precision = Precision.of(self._model, str(self._model.device.type), "torch")
        return measure(run_padded, rows, self._likelihoods.sides, max_tokens, precision)

    def _pad(self, rows: Sequence[Prepared], side: Side) -> Mapping[str, torch.Tensor]:
        """Returns the padded tensors, and the fields of Places.

        No token sees padding at its right, so that side needs no mask. At the left, `position_ids` count the tokens of
        each row without padding: models with learned positions would count padding.
        """
        pairs = pairs_of(rows)
        tensors = self._padding.pad([pair.ids for pair in pairs], side)
        ids, mask = tensors["input_ids"], tensors.pop("attention_mask")
        ends = [ids.shape[1]] * len(pairs) if side == "left" else [row.tokens for row in rows]
        places = Places.of(ids, ends, [pair.query_tokens for pair in pairs])
        if side == "left":
            tensors |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return {**tensors, **places._asdict()}

    def samples(self, tokens: int) -> Sequence[Json]:
        return [sample(self._pairs, tokens, self.sample_options)]


def _bos(tokenizer: object) -> str:
    """Returns the text of the token that the tokenizer puts before each text, if that is its BOS token."""
    ids = tokenizer("a")["input_ids"]  # type: ignore[operator]
    bos, number = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    return str(bos) if bos and ids[:1] == [number] else ""
