"""Language models that generate text: loads one, proves it, prepares prompts, and starts the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed, ModelUnavailable, described
from millstream.broker.contract.generation import GenerateOptions
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import GENERATE
from millstream.broker.contract.partial import Record
from millstream.broker.contract.prompt import Prompt
from millstream.worker.generation.blocks import BLOCK, blocks_for
from millstream.worker.generation.checks import Proof, refuse_layers, refuse_model, use_blocks
from millstream.worker.generation.decoder import Decoder
from millstream.worker.generation.engine import SlotsEngine
from millstream.worker.generation.forward import Forward
from millstream.worker.generation.grammar import Grammars
from millstream.worker.generation.sampling import choose
from millstream.worker.generation.sequence import Sequence as Text
from millstream.worker.generation.settings import TextSettings
from millstream.worker.generation.templates import encode_prompt, tool_calls_of
from millstream.worker.models.base import Prepared
from millstream.worker.models.loading.causal import load_causal
from millstream.worker.models.loading.fetch import fetch_folder
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.library import dtype_of, token_limit
from millstream.worker.models.loading.limits import find_limit
from millstream.worker.scheduling.batcher import Row

log = logging.getLogger(__name__)

MOST_PART_CPU = 512
"""Tokens of prompts in one forward on a CPU, at most. More take as long in two forwards, and give tokens later."""

SAMPLE_OPTIONS: Mapping[str, Json] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
"""Options of the texts with which a worker measures: a prompt, and a few tokens behind it."""


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> GenerationModel:
    """Returns the loaded language model of `spec`. Raises ModelUnavailable."""
    source = Folder(fetch_folder(spec.model), spec.model.revision)
    return GenerationModel(source, spec.model, spec.runtime, device, threads)


class GenerationModel:
    """One causal language model on one device, whose attention reads a cache in blocks.

    `runtime.batch_size` is the number of texts at once, `runtime.max_batch_tokens` that of the cache's tokens.
    """

    op = GENERATE.op
    sample_options = SAMPLE_OPTIONS

    def __init__(self, folder: Folder, spec: ModelSpec, runtime: Runtime, device: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        tokenizer, self._model = load_causal(
            folder, spec, device, lambda config: refuse_layers(spec.model_name, config)
        )
        refuse_model(spec.model_name, self._model)
        longest = min(token_limit(tokenizer, self._model.config), forget(self._model))
        self.limit = find_limit(int(spec.max_length or longest), self._read, spec.max_length)
        proof = Proof(spec.model_name, self._model, self.limit.tokens)
        use_blocks(spec.model_name, self._model)
        proof.check(Forward(self._model))
        self._decoder = self._prove_decoder(proof, runtime.batch_size) if spec.kernels != "off" else None
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        self._settings = TextSettings.of(tokenizer, vocabulary, self.limit.tokens, self._model.generation_config)
        self._grammars = Grammars(self._settings)
        self.fingerprint = folder.fingerprint(
            spec, dtype_of(self._model), "slots", folder.digest("generation_config.json")
        )
        self.device_type, self.backend = str(self._model.device.type), spec.backend
        self._engine: SlotsEngine | None = None
        self.adapt(runtime)

    def _prove_decoder(self, proof: Proof, slots: int) -> Decoder | None:
        """Returns a decoder of the model, with which it runs faster; None if its layers are others.

        `slots`: texts that grow at once, by which the products of its matrices are timed.
        """
        if not Decoder.knows(self._model):
            return None
        decoder = Decoder(self._model, self.limit.tokens)
        try:
            proof.check(Forward(self._model, decoder))
        except ModelUnavailable as error:
            log.warning("%s: it runs as transformers has it", error)
            decoder.release()
            return None
        if decoder.pack(slots):
            self._prove_packed(decoder, proof)
        return decoder

    def _prove_packed(self, decoder: Decoder, proof: Proof) -> None:
        try:
            proof.check(Forward(self._model, decoder))
        except ModelUnavailable as error:
            log.warning("%s: its matrices stay as torch has them", error)
            decoder.unpack()

    def _read(self, tokens: int) -> None:
        """Runs one text of that many tokens by transformers' own forward."""
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self._model.device)
        with torch.inference_mode():
            self._model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def adapt(self, runtime: Runtime) -> None:
        self._slots, self._cache_tokens = runtime.batch_size, max(BLOCK, runtime.batch_tokens // BLOCK * BLOCK)
        if self._engine:
            self._engine.limit(self._slots, self._cache_tokens)

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        try:
            read = GenerateOptions.read(options)
        except InvalidRequest as error:
            return [error] * len(inputs)
        return [self._row(value, read) for value in inputs]

    def _row(self, value: Json, options: GenerateOptions) -> Prepared | MillstreamError:
        try:
            prompt = Prompt.read(value)
            ids = encode_prompt(prompt, self._settings)
            if len(ids) >= self._cache_tokens:
                raise InvalidRequest(
                    f"a prompt of {len(ids)} tokens, and the cache holds {self._cache_tokens} of prompt and text",
                    hint="shorten the prompt, or raise max_batch_tokens of the service",
                )
            return Prepared(len(ids), self._text(ids, prompt, options))
        except MillstreamError as error:
            return error.with_traceback(None)
        except Exception as error:  # noqa: BLE001 - a tokenizer's fault is this row's
            return ModelFailed(described(error))

    def _text(self, ids: Sequence[int], prompt: Prompt, options: GenerateOptions) -> Text:
        tools = prompt.tools
        return Text(
            ids,
            options,
            self._settings,
            continues=prompt.messages is None,
            grammar=self._grammars.compile(options.response_format),
            read_calls=(lambda tokens, before: tool_calls_of(tokens, before, tools, self._settings)) if tools else None,
        )

    def begin(self, row: Prepared, job_id: str, records: Sequence[Record]) -> None:
        text = cast(Text, row.features)
        text.begin(job_id, records)
        row.output_tokens = text.generated

    def start_engine(self) -> SlotsEngine:
        self._engine = self._new_engine(self._slots, self._cache_tokens)
        return self._engine

    def _new_engine(self, slots: int, cache_tokens: int) -> SlotsEngine:
        part_tokens = MOST_PART_CPU if self.device_type == "cpu" else None
        return SlotsEngine(Forward(self._model, self._decoder), choose, slots, cache_tokens, part_tokens)

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        """Generates all texts of `rows` from their prompts, in a cache of its own: for measurements.

        Raises the error of the first row that fails.
        """
        texts = [cast(Text, row.features) for row in rows]
        fresh = [Text(each.tokens[: each.prompt_length], each.options, self._settings) for each in texts]
        most = sum(blocks_for(each.prompt_length + each.limit) + 1 for each in fresh)
        engine = self._new_engine(len(rows), most * BLOCK)
        engine.admit([Row(text.prompt_length, (0, at), str(at), 0, Prepared(0, text)) for at, text in enumerate(fresh)])
        outcomes: dict[str, Any] = {}
        while engine.busy:
            step = engine.step()
            outcomes |= {row.owner: outcome for row, outcome in zip(step.rows, step.outcomes, strict=True)}
        for outcome in outcomes.values():
            if isinstance(outcome, MillstreamError):
                raise outcome
        return [outcomes[str(at)] for at in range(len(rows))]

    def samples(self, tokens: int) -> Sequence[Json]:
        vocabulary = self._settings.vocabulary
        most = max(1, min(tokens, self.limit.tokens - 1, self._cache_tokens - 1))
        return [{"token_ids": [(7 * at * at + 11 * at + 3) % vocabulary for at in range(most)]}]
