"""A text as it grows: defaults, ends, records, and going on from the records of another run."""

from __future__ import annotations

from collections.abc import Sequence as Series
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import VOCABULARY, byte_level, ids_of, metaspace, text_settings

from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError, ModelFailed
from millstream.broker.contract.generation import GenerateOptions, Generation, Usage
from millstream.broker.contract.partial import Record
from millstream.worker.generation.record import Token, decode_tokens, encode_token
from millstream.worker.generation.sampling import choose
from millstream.worker.generation.sequence import Sequence, seed_of
from millstream.worker.generation.settings import TextSettings

PROMPT = ids_of("the mill")
TOKENIZERS = {"byte level": text_settings(context=80), "metaspace": text_settings(metaspace(), context=80)}


def begun(records: Series[Record] = (), facts: TextSettings | None = None, **options: Any) -> Sequence:
    text = Sequence(PROMPT, GenerateOptions.read(options), facts or text_settings())
    text.begin("job", records)
    return text


def said(text: Sequence, words: str) -> list[Record]:
    """The records of a text whose model says `words`."""
    records = []
    for token in ids_of(words):
        records.append(text.add(Token(token)).record)
        if text.reason:
            break
    return records


def result(text: Sequence, reason: str = "") -> Generation:
    return Generation.read(text.conclude(reason or text.reason))


def run(text: Sequence, steps: int = 10**9) -> list[Record]:
    """The records of at most `steps` steps of a model whose logits depend on all tokens before."""
    records: list[Record] = []
    while not text.reason and len(records) < steps:
        generator = torch.Generator().manual_seed(hash(tuple(text.tokens)) % 2**62)
        (token,) = choose(2 * torch.randn(1, VOCABULARY, generator=generator), [text])
        assert not isinstance(token, MillstreamError)
        records.append(text.add(token).record)
    return records


@settings(max_examples=100, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=3).map(sorted),
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
    options=st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 20),
            "temperature": st.sampled_from([0.0, 1.0, 3.0]),
            "max_tokens": st.integers(1, 60),
            "stop": st.lists(st.sampled_from(["e", "mi", "ll w", "\ufffd", "th", "x y"]), max_size=3),
            "stop_token_ids": st.just([20, 21]),
            "repetition_penalty": st.just(1.3),
            "frequency_penalty": st.just(0.4),
            "logprobs": st.sampled_from([0, 2]),
            "ignore_eos": st.booleans(),
        },
    ),
)
def test_a_run_cut_anywhere_goes_on_as_the_undisturbed_one(
    cuts: list[int], tokenizer: str, options: dict[str, Any]
) -> None:
    facts = TOKENIZERS[tokenizer]
    whole = begun(facts=facts, **options)
    run(whole)
    records: list[Record] = []
    for first, last in pairwise([0, *cuts, 10**9]):
        text = begun(records, facts, **options)
        records += run(text, last - first)

    final = result(whole)
    assert result(text) == final
    assert text.tokens == whole.tokens
    shown = ""
    for record in records:
        shown += record.text
        assert final.text.startswith(shown)
        assert not any(stop in shown for stop in whole.options.stop)
    assert not any(stop in final.text for stop in whole.options.stop)
    assert result(begun(records, facts, **options)) == final


def test_a_text_ends_at_an_end_token_which_has_no_text() -> None:
    text = begun()

    said(text, " turns<|end|> on")

    assert text.reason == "stop"
    assert result(text) == Generation(" turns", "stop", Usage(2, len(ids_of(" turns<|end|>"))), seed_of("job"))


def test_ignore_eos_goes_on_behind_end_tokens() -> None:
    text = begun(ignore_eos=True)

    said(text, " turns<|end|> the wheel")

    assert text.reason == ""
    assert text.text == " turns the wheel"


def test_end_tokens_come_from_the_generation_config_and_from_the_tokenizer() -> None:
    assert text_settings(eos_token_id=[3, 7]).eos == {1, 3, 7}
    assert text_settings(eos_token_id=3).eos == {1, 3}


def test_a_stop_token_ends_a_text_and_has_no_text() -> None:
    text = begun(stop_token_ids=ids_of(" wheel"))

    said(text, " the wheel turns")

    assert result(text).text == " the"
    assert text.reason == "stop"


def test_a_stop_string_over_several_tokens_is_never_shown_but_its_tokens_are_kept() -> None:
    text = begun(stop="mill wheel")

    records = said(text, " the mill wheel turns")

    assert [record.text for record in records] == [" the", " ", ""]
    assert text.reason == "stop"
    assert result(text).text == " the "
    assert [token.id for record in records for token in decode_tokens(record.state)] == ids_of(" the mill wheel")


def test_text_that_was_held_back_belongs_to_a_text_that_ends_otherwise() -> None:
    text = begun(stop="mill wheel", max_tokens=2)

    records = said(text, " the mill wheel turns")

    assert [record.text for record in records] == [" the", " "]
    assert text.reason == "length"
    assert result(text).text == " the mill"


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    text = begun(max_tokens=2)

    said(text, "😀")

    assert result(text) == result(text)
    assert result(text).text == "\ufffd"


def test_a_deadline_ends_a_text_with_what_there_is() -> None:
    text = begun(stop="wheel turns")
    said(text, " the wheel")

    assert result(text, "deadline")[:2] == (" the wheel", "deadline")


def test_the_context_ends_a_text() -> None:
    text = begun(facts=text_settings(context=5))

    said(text, " the the the the")

    assert (text.reason, text.generated, len(text.tokens)) == ("length", 3, 5)


def test_a_prompt_without_room_for_a_token_is_too_long() -> None:
    with pytest.raises(InputTooLong, match="a prompt of 2 tokens; prompt and text together have at most 2"):
        begun(facts=text_settings(context=2))


@pytest.mark.parametrize(
    ("prompt", "problem"), [([], "no tokens"), ([5, 400], "the prompt: the model has no token 400")]
)
def test_a_prompt_that_the_model_cannot_read_is_refused(prompt: list[int], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        Sequence(prompt, GenerateOptions(), text_settings())


@pytest.mark.parametrize("options", [{"stop_token_ids": [400]}, {"logit_bias": {"400": 1.0}}])
def test_token_ids_beyond_the_vocabulary_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"{next(iter(options))}: the model has no token 400"):
        begun(**options)


@pytest.mark.parametrize(
    ("config", "options", "temperature", "top_k"),
    [
        ({}, {}, 0.0, 0),
        ({"temperature": 0.7, "top_k": 20}, {}, 0.0, 20),
        ({"do_sample": True}, {}, 1.0, 0),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {}, 0.7, 20),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {"temperature": 0, "top_k": 0}, 0.0, 0),
        ({"top_k": 20}, {"temperature": 0.5}, 0.5, 20),
    ],
)
def test_none_means_the_models_generation_config(
    config: dict[str, Any], options: dict[str, Any], temperature: float, top_k: int
) -> None:
    text = begun(facts=text_settings(**config), **options)

    assert (text.sampling.temperature, text.sampling.top_k) == (temperature, top_k)


def test_the_most_tokens_come_from_the_call_or_from_the_generation_config() -> None:
    facts = text_settings(max_new_tokens=9)

    assert begun(facts=facts).limit == 9
    assert begun(facts=facts, max_tokens=50).limit == 50
    assert begun(facts=facts, max_tokens=10_000).limit == 198


def test_the_seed_is_the_calls_or_comes_from_the_jobs_id() -> None:
    assert begun(seed=0).seed == 0
    assert begun().seed == seed_of("job") != seed_of("job2")
    assert 0 <= seed_of("job") < 2**63
    assert result(begun(seed=5), "deadline").seed == 5


def test_log_probabilities_are_reported_for_each_token_also_of_earlier_runs() -> None:
    whole = begun(logprobs=2, max_tokens=6)
    records = run(whole)
    text = begun(records[:3], logprobs=2, max_tokens=6)
    run(text)

    logprobs = result(text).logprobs

    assert logprobs == result(whole).logprobs
    assert logprobs is not None
    assert len(logprobs) == 6
    assert all(len(each.top) == 2 for each in logprobs)


def test_records_of_another_tokenizer_are_refused() -> None:
    records = [Record("wheel", encode_token(Token(ids_of("mill")[0])))]

    with pytest.raises(ModelFailed, match="another text than the 5 characters"):
        begun(records)


@pytest.mark.parametrize(
    "state", [b"\x00", b"\x10", b"\x11\x05\x00", b"\x10\x80", encode_token(Token(5, -1.0, ((3, -0.5),)))[:-1]]
)
def test_records_that_cannot_be_read_are_refused(state: bytes) -> None:
    with pytest.raises(ModelFailed, match="cannot be read"):
        begun([Record("", state)])


def test_records_behind_the_end_of_a_text_are_refused() -> None:
    records = [Record("", encode_token(Token(token))) for token in ids_of("<|end|><|end|>")]

    with pytest.raises(ModelFailed, match="go on after the end"):
        begun(records)


def test_a_text_whose_records_have_its_end_has_ended() -> None:
    records = said(begun(), " turns<|end|>")

    text = begun(records)

    assert text.reason == "stop"
    assert result(text).text == " turns"


@given(
    tokens=st.lists(
        st.builds(
            Token,
            st.integers(0, 2**31),
            st.none() | st.floats(-9999.0, 0.0, width=32),
            st.lists(st.tuples(st.integers(0, 2**31), st.floats(-9999.0, 0.0, width=32)), max_size=20).map(tuple),
        ).map(lambda token: token if token.logprob is not None else token._replace(top=()))
    )
)
def test_tokens_are_written_and_read_back(tokens: list[Token]) -> None:
    assert list(decode_tokens(b"".join(map(encode_token, tokens)))) == tokens


def test_a_token_takes_few_bytes() -> None:
    assert [len(encode_token(Token(number))) for number in (100, 10_000, 150_000)] == [2, 3, 4]


def test_the_tool_calls_of_a_text_are_in_its_result() -> None:
    calls = [{"name": "weather", "arguments": {}}]
    seen: list[Series[int]] = []

    def read(generated: Series[int], prompt: Series[int]) -> list[Any]:
        seen.extend((generated, prompt))
        return calls

    text = Sequence(PROMPT, GenerateOptions(), text_settings(), read_calls=read)
    text.begin("job", [])
    said(text, " turns<|end|>")

    assert result(text).tool_calls == tuple(calls)
    assert seen == [ids_of(" turns<|end|>"), PROMPT]


def test_the_text_of_a_token_has_the_space_before_it() -> None:
    for facts in (text_settings(), text_settings(metaspace())):
        token = facts.backend.encode("the mill", add_special_tokens=False).ids[-1]

        assert facts.token_text(token) == " mill"
    assert text_settings().token_text(1) == "<|end|>"
    assert byte_level().backend_tokenizer.id_to_token(399) is None
    assert text_settings().token_text(399) == ""
