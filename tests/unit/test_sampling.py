"""Choosing tokens: random numbers, limits and penalties, and independence of a row from the others."""

from __future__ import annotations

from collections.abc import Sequence as Series
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import VOCABULARY, text_settings
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.generation import GenerateOptions
from millstream.worker.generation.philox import philox4x32, uniforms
from millstream.worker.generation.record import Token
from millstream.worker.generation.sampling import LEAST_LOGPROB, choose
from millstream.worker.generation.sequence import Sequence
from millstream.worker.generation.settings import Sampling
from millstream.worker.generation.weights import weigh

PROMPT = [10, 11, 12, 11]

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 1e-300},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "little top_k": {"temperature": 2.0, "top_k": 2},
    "top_k above the vocabulary": {"temperature": 1.0, "top_k": 10**6},
    "top_p": {"temperature": 0.8, "top_p": 0.7},
    "tiny top_p": {"temperature": 1.0, "top_p": 1e-20},
    "min_p": {"temperature": 1.3, "min_p": 0.2},
    "everything": {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 3.0, "10": -100},
        "logprobs": 4,
    },
    "penalised greedy": {"repetition_penalty": 1.5, "logprobs": 0},
    "biased greedy": {"logit_bias": {"42": 100}},
}


def sequence(seed: int = 1, generated: Series[int] = (), **options: Any) -> Sequence:
    text = Sequence(PROMPT, GenerateOptions(seed=seed, **options), text_settings(), continues=False)
    text.begin("job", [])
    for token in generated:
        text.add(Token(token, -1.0))
    return text


def random_logits(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)


def ids(tokens: Series[object]) -> list[int]:
    return [token.id for token in tokens if isinstance(token, Token)]


KNOWN_ANSWERS = """\
philox4x32 10 00000000 00000000 00000000 00000000 00000000 00000000   6627e8d5 e169c58d bc57ac4c 9b00dbd8
philox4x32 10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff   408f276d 41c83b0e a20bc7c6 6d5451fd
philox4x32 10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0   d16cfe09 94fdcceb 5001e420 24126ea1
"""
"""Lines 27 to 29 of tests/kat_vectors in Random123 1.14.0: name, rounds, four words of the counter, two of the key, and
the four words expected. Taken from the file in Debian's librandom123-doc 1.14.0+dfsg-4."""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.splitlines(), ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers_of_random123(line: str) -> None:
    words = [int(word, 16) for word in line.split()[2:]]

    assert philox4x32([words[:4]], [words[4:6]]).tolist() == [words[6:]]


def test_philox_gives_each_row_of_several_its_known_answer() -> None:
    table = np.array([[int(word, 16) for word in line.split()[2:]] for line in KNOWN_ANSWERS.splitlines()])

    assert philox4x32(table[:, :4], table[:, 4:6]).tolist() == table[:, 6:].tolist()


def test_random_numbers_are_uniform_inside_of_0_and_1_and_depend_on_seed_and_index() -> None:
    numbers = uniforms(np.full(20_000, 2**63 - 1), np.arange(20_000))

    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((numbers > 0) & (numbers < 1)).all()
    assert (np.abs(counts - 1_000) < 150).all()
    assert uniforms([7, 7, 8], [2**33, 2**33 + 1, 2**33]).tolist() == [
        *uniforms([7], [2**33]),
        *uniforms([7], [2**33 + 1]),
        *uniforms([8], [2**33]),
    ]


def test_temperature_0_takes_the_most_probable_token_and_the_lowest_id_of_equals() -> None:
    logits = random_logits(2)
    logits[0, [300, 17]] = 50.0

    assert ids(choose(logits, [sequence(), sequence(temperature=0.0)])) == [17, int(logits[1].argmax())]


def allowed_by_transformers(scores: torch.Tensor, sampling: Sampling) -> set[int]:
    """The ids that transformers' processors leave, for one row."""
    processors: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    rest = LogitsProcessorList(processors)(cast(torch.LongTensor, torch.tensor([PROMPT])), scores[None])[0]
    return set(rest.isfinite().nonzero()[:, 0].tolist())


@settings(max_examples=100, deadline=None)
@given(
    temperature=st.floats(0.5, 3.0),
    top_k=st.sampled_from([0, 1, 5, 40, 1_000]),
    top_p=st.sampled_from([1e-20, 0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1_000),
    half=st.booleans(),
)
def test_the_tokens_that_can_be_drawn_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int, half: bool
) -> None:
    # bfloat16 logits have many equal values: which of them top_p keeps is not defined in transformers.
    scores = random_logits(1, seed, torch.bfloat16 if half else torch.float32)[0].double() / 2
    sampling = Sampling(temperature, top_p, top_k, min_p)

    weights = weigh((scores - scores.max())[None], [sampling])[0]

    allowed = allowed_by_transformers(scores, sampling)
    if half:
        assert scores[weights > 0].sort().values.tolist() == scores[sorted(allowed)].sort().values.tolist()
    else:
        assert set(weights.nonzero()[:, 0].tolist()) == allowed


def test_top_p_keeps_the_lowest_ids_of_equals() -> None:
    scores = torch.full((1, VOCABULARY), -3.0, dtype=torch.float64)
    scores[0, [9, 5, 300, 77]] = 0.0

    weights = weigh(scores, [Sampling(1.0, 0.07)])

    assert weights.nonzero()[:, 1].tolist() == [5, 9]


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    scores = random_logits(1).double()
    text = sequence(generated=[13, 14, 13], repetition_penalty=penalty)
    processor = RepetitionPenaltyLogitsProcessor(penalty)

    expected = processor(torch.tensor([text.tokens]), scores)[0]
    text.occurrences.penalise(scores[0], penalty, 0.0, 0.0)

    assert torch.equal(scores[0], expected)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.full((1, VOCABULARY), -1e9)
    logits[0, [5, 9, 20]] = torch.tensor([0.5, 0.3, 0.2]).log()
    texts = [sequence(seed=each, temperature=1.0) for each in range(4_000)]

    drawn = np.array(ids(choose(logits.expand(4_000, -1), texts)))

    assert [round(float((drawn == each).mean()), 2) for each in (5, 9, 20)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_the_random_number_chooses_in_the_order_of_ids() -> None:
    logits = random_logits(1)
    probabilities = logits[0].double().softmax(0).cumsum(0)
    texts = [sequence(seed=each, temperature=1.0) for each in range(500)]

    drawn = ids(choose(logits.expand(500, -1), texts))

    numbers = torch.from_numpy(uniforms(np.arange(500), np.zeros(500)))
    assert drawn == torch.searchsorted(probabilities, numbers, right=True).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_token_that_it_gets_alone(dtype: torch.dtype) -> None:
    texts = [sequence(seed=at, generated=[5] * at, **given) for at, given in enumerate(OPTIONS.values())]
    logits = random_logits(len(texts), 3, dtype)

    together = choose(logits, texts)
    alone = [choose(logits[at : at + 1], [text])[0] for at, text in enumerate(texts)]
    backwards = choose(logits.flip(0), texts[::-1])[::-1]

    assert together == alone == backwards
    assert all(isinstance(token, Token) for token in together)


def test_a_rows_token_depends_on_its_index() -> None:
    logits = random_logits(1)
    texts = [sequence(generated=[5] * length, temperature=2.0) for length in range(50)]

    assert len(set(ids(choose(logits.expand(50, -1), texts)))) > 10


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_that_are_not_finite_fail_their_row_alone(name: str) -> None:
    logits = random_logits(5)
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = -float("inf")

    tokens = choose(logits, [sequence(), *(sequence(**OPTIONS[name]) for _ in range(3)), sequence(**OPTIONS[name])])

    assert [isinstance(token, ModelFailed) for token in tokens] == [False, True, True, True, False]


def test_presence_and_frequency_are_subtracted_for_generated_tokens_alone() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [11, 30, 31]] = torch.tensor([1.0, 3.0, 3.0])
    text = sequence(generated=[30, 30, 31], presence_penalty=1.0, frequency_penalty=0.6)

    # 30: 3 - 1 - 2 * 0.6 = 0.8; 31: 3 - 1 - 0.6 = 1.4; 11 stands only in the prompt.
    assert ids(choose(logits, [text])) == [31]
    text.add(Token(31))
    assert ids(choose(logits, [text])) == [11]


def test_repetition_penalty_counts_prompt_and_text() -> None:
    logits = torch.full((1, VOCABULARY), -5.0)
    logits[0, [11, 30, 31]] = torch.tensor([3.0, 2.9, 2.0])

    assert ids(choose(logits, [sequence(generated=[30], repetition_penalty=2.0)])) == [31]


def test_log_probabilities_are_those_of_the_models_own_logits() -> None:
    logits = random_logits(2)
    texts = [sequence(logprobs=3, logit_bias={"7": 100}), sequence(logprobs=20, temperature=5.0, top_k=1)]

    first, second = choose(logits, texts)

    expected = logits.double().log_softmax(-1)
    assert isinstance(first, Token)
    assert isinstance(second, Token)
    assert first.id == 7
    assert first.logprob == pytest.approx(float(expected[0, 7]), abs=1e-6)
    assert [each for each, _ in first.top] == expected[0].topk(3).indices.tolist()
    assert [value for _, value in second.top] == pytest.approx(expected[1].topk(20).values.tolist(), abs=1e-6)
    assert second.top[0] == (second.id, second.logprob)


def test_a_token_that_the_model_excludes_has_a_finite_log_probability() -> None:
    logits = torch.full((1, VOCABULARY), -float("inf"))
    logits[0, 5] = 1.0

    (token,) = choose(logits, [sequence(logprobs=2)])

    assert isinstance(token, Token)
    assert token.logprob == 0.0
    assert token.top[1][1] == LEAST_LOGPROB


def test_logits_are_not_changed() -> None:
    texts = [sequence(**given) for given in OPTIONS.values()]
    logits = random_logits(len(texts), dtype=torch.float64)
    before = logits.clone()

    choose(logits, texts)

    assert torch.equal(logits, before)
