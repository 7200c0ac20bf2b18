"""Texts that follow a grammar."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
import torch
from texts import EOS, VOCABULARY, byte_level, ids_of, metaspace, text_settings
from transformers import PreTrainedTokenizerFast

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed
from millstream.broker.contract.generation import GenerateOptions, Generation
from millstream.broker.contract.job import Json
from millstream.broker.contract.prompt import Prompt
from millstream.worker.generation import grammar
from millstream.worker.generation.grammar import Grammar, Grammars, excluded_by
from millstream.worker.generation.record import Token
from millstream.worker.generation.sampling import choose
from millstream.worker.generation.sequence import Sequence

SCHEMA: dict[str, Json] = {
    "type": "object",
    "properties": {"name": {"enum": ["mill", "wheel"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}

PAIR: Json = {"type": "regex", "pattern": "[0-9]{3}-[ab]{2}"}


def text_of(response_format: Json, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None) -> Generation:
    """The text of a model that gives every token any probability."""
    settings = text_settings(tokenizer)
    options = GenerateOptions.read({"response_format": response_format, "temperature": 1.5, "seed": seed})
    text = Sequence.of(Prompt.read("a"), options, settings, Grammars(settings))
    generator = torch.Generator().manual_seed(seed)
    while not text.reason:
        (token,) = choose(torch.randn(1, VOCABULARY, generator=generator), [text])
        assert not isinstance(token, MillstreamError)
        text.add(token)
    return Generation.read(text.conclude(text.reason))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte level", "metaspace"])
def test_any_text_follows_its_json_schema(seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
    generation = text_of({"type": "json_schema", "schema": SCHEMA}, seed, tokenizer)

    if generation.finish_reason == "stop":
        jsonschema.validate(json.loads(generation.text), SCHEMA)
    else:
        assert generation.finish_reason == "length"


def test_a_regular_expression_is_followed_and_ends_the_text() -> None:
    generation = text_of(PAIR)

    assert generation.finish_reason == "stop"
    assert re.fullmatch("[0-9]{3}-[ab]{2}", generation.text)
    assert generation.usage is not None
    # Nothing can follow: no forward is spent on an end token.
    assert generation.usage.completion == 6


def test_a_lark_grammar_is_followed() -> None:
    grammar_text = 'start: "mill" (" and " "wheel")?'

    assert text_of({"type": "grammar", "grammar": grammar_text}).text in ("mill", "mill and wheel")


def test_json_object_is_an_object() -> None:
    settings = text_settings()

    compiled = Grammars(settings).compile({"type": "json_object"})

    assert compiled is not None
    assert allowed_by(compiled) == {"{"}


def test_every_end_token_of_the_model_may_end_a_text() -> None:
    settings = text_settings(eos_token_id=[3])
    compiled = Grammars(settings).compile({"type": "regex", "pattern": "a*"})

    assert compiled is not None
    assert allowed_by(compiled) == {"a", EOS, "<|im_end|>"}


def allowed_by(compiled: Grammar) -> set[str | None]:
    (excluded,) = excluded_by([compiled], VOCABULARY)
    return {byte_level().backend_tokenizer.id_to_token(int(token)) for token in np.flatnonzero(~excluded)}


@pytest.mark.parametrize("response_format", [None, {"type": "text"}])
def test_a_free_text_has_no_grammar(response_format: dict[str, Json] | None) -> None:
    assert Grammars(text_settings()).compile(response_format) is None


@pytest.mark.parametrize(
    ("response_format", "reason"),
    [
        ({"type": "regex", "pattern": "(a"}, "unclosed group"),
        ({"type": "grammar", "grammar": "start: x"}, 'unknown name: "x"'),
        ({"type": "json_schema", "schema": {"type": "wheel"}}, "Invalid type: wheel"),
        ({"type": "json_schema", "schema": {"$ref": "http://mill/x"}}, "does not fetch"),
    ],
)
def test_a_format_that_cannot_be_compiled_is_refused_with_its_reason(
    response_format: dict[str, Json], reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"response_format: (?s:.*){reason}"):
        Grammars(text_settings()).compile(response_format)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "LLMatcher", None)

    with pytest.raises(InvalidRequest, match=re.escape('pip install "millstream[structured]"')):
        Grammars(text_settings()).compile({"type": "json_object"})


def test_ignore_eos_is_refused_with_a_grammar() -> None:
    settings = text_settings()
    options = GenerateOptions.read({"response_format": PAIR, "ignore_eos": True})

    with pytest.raises(InvalidRequest, match="exclude each other"):
        Sequence.of(Prompt.read("a"), options, settings, Grammars(settings))
    free = options._replace(response_format={"type": "text"})
    assert Sequence.of(Prompt.read("a"), free, settings, Grammars(settings)).grammar is None


def test_a_text_with_a_grammar_goes_on_behind_its_records() -> None:
    settings = text_settings()
    options = GenerateOptions.read({"response_format": PAIR})
    first, second = (Sequence.of(Prompt.read("a"), options, settings, Grammars(settings)) for _ in range(2))
    records = [first.add(Token(token)).record for token in ids_of("123-a")]

    second.begin("job", records)

    (token,) = choose(torch.arange(VOCABULARY)[None].float(), [second])
    assert isinstance(token, Token)
    assert token.id == ids_of("b")[0]
    assert second.add(token).reason == "stop"
    with pytest.raises(ModelFailed, match="the grammar does not go on"):
        first.add(Token(ids_of("x")[0]))


def test_rows_without_a_grammar_are_not_masked() -> None:
    settings = text_settings()
    options = GenerateOptions.read({"response_format": PAIR})
    texts = [Sequence.of(Prompt.read("a"), each, settings, Grammars(settings)) for each in (options, GenerateOptions())]
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 399] = 1.0

    masked, free = choose(logits, texts)

    assert not isinstance(masked, MillstreamError)
    assert not isinstance(free, MillstreamError)
    assert byte_level().backend_tokenizer.id_to_token(masked.id) == "0"
    assert free.id == 399
