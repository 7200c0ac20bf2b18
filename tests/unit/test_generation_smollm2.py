"""The engine gives the texts of transformers' `generate` on a real model: SmolLM2-135M-Instruct in float32.

The model runs if MILLSTREAM_LONG=1, for about ten minutes; -s shows the near-ties:

    MILLSTREAM_LONG=1 .venv/bin/pytest -s tests/unit/test_generation_smollm2.py

test_generation_engine.py has tiny models for each run of the tests: in float64, so that each token must be equal.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from generating import Job, Run, load, rows_of, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer

LONG = pytest.mark.skipif(os.environ.get("MILLSTREAM_LONG") != "1", reason="MILLSTREAM_LONG is not 1")
LIMIT = pytest.mark.timeout(1_800)

PROMPTS, NEIGHBOURS, SLOTS, CONTEXT = 64, 24, 12, 512
LEAST, MOST = 8, 32
"""Tokens of a text."""

PART_TOKENS = (7, 16, 128)
BUSY = 8
"""Slots that are busy in the mean, at least."""

MARGIN = 1e-4
"""A difference passes if the reference's logit of its own token is above that of the engine's token by less than this.

The last bits of a float32 sum depend on the number of rows that are computed together.
"""

CORPUS = (
    "the mill turns in a stream and a miller grinds corn for the whole valley at night who asks 1234 water wheel, why?"
    "\n\nTell me about Paris. def grind(corn): return flour; ist die Mühle alt? 水车 {json}"
)


class Tie(NamedTuple):
    """A difference that passes: the number of its prompt, of its token, and the margin."""

    prompt: int
    token: int
    margin: float


class Reference:
    """transformers' own `generate`, for one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval()

    def generate(self, prompt: Sequence[int], most: int, **options: Any) -> Any:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            return self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, **options
            )

    def text(self, prompt: Sequence[int], most: int) -> list[int]:
        return [int(each) for each in self.generate(prompt, most)[0, len(prompt) :]]

    def margin(self, prompt: Sequence[int], ours: int) -> float:
        """Logit of the token that `generate` puts behind `prompt`, less that of the token `ours`."""
        logits = self.generate(prompt, 1, return_dict_in_generate=True, output_logits=True).logits[0][0]
        return float(logits.max() - logits[ours])


def ties_of(reference: Reference, at: int, job: Job, expected: Sequence[int], found: Sequence[int]) -> list[Tie]:
    """The near-ties of one text. Fails at any other difference.

    Behind a tie `generate` goes on from the engine's own tokens, so each token of the text is compared.
    """
    ties: list[Tie] = []
    first = 0
    while list(found[first:]) != list(expected):
        same = first + common(found[first:], expected)
        assert same < len(found), f"prompt {at}: the text ends after {same} tokens, {job.prompt} -> {found}"
        ties.append(Tie(at, same, reference.margin([*job.prompt, *found[:same]], found[same])))
        assert ties[-1].margin < MARGIN, f"prompt {at}: token {same} differs, {job.prompt} -> {found}"
        first = same + 1
        is_over = first == job.most or found[same] == END
        expected = [] if is_over else reference.text([*job.prompt, *found[:first]], job.most - first)
    return ties


END = 2
"""Id of the model's end token."""


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(one), len(other)))


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return load(smollm2, dtype="float32", context=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def job_of(rng: random.Random, tokenizer: Any) -> Job:
    """A prompt of 1 to about 250 tokens: half of them are texts, half are messages in the chat template."""
    text = " ".join(rng.choices(CORPUS.split(" "), k=rng.choice((1, 4, 15, 50, 120))))
    if rng.random() < 0.5:
        messages = [{"role": "user", "content": text}]
        return Job(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), most(rng))
    return Job(tokenizer(text)["input_ids"], most(rng))


def most(rng: random.Random) -> int:
    return rng.randint(LEAST, MOST)


class Scripted(Reference):
    """A reference that has no model: its texts by the number of tokens before them, and one margin."""

    def __init__(self, texts: Mapping[int, list[int]], margin: float) -> None:
        self._texts = texts
        self._margin = margin

    def text(self, prompt: Sequence[int], most: int) -> list[int]:
        return self._texts[len(prompt)][:most]

    def margin(self, prompt: Sequence[int], ours: int) -> float:
        return self._margin


def test_a_near_tie_passes_and_is_counted_and_what_follows_it_is_compared() -> None:
    job, found = Job([3, 4], 4), [5, 9, 7, 7]
    goes_on_alike, goes_on_otherwise = {4: [7, 7]}, {4: [7, 8], 6: []}

    assert ties_of(Scripted(goes_on_alike, 5e-5), 0, job, [5, 6, 7, 8], found) == [Tie(0, 1, 5e-5)]
    assert len(ties_of(Scripted(goes_on_otherwise, 5e-5), 0, job, [5, 6, 7, 8], found)) == 2
    assert ties_of(Scripted({}, 1.0), 0, job, found, found) == []
    with pytest.raises(AssertionError, match="token 1 differs"):
        ties_of(Scripted(goes_on_alike, 1e-4), 0, job, [5, 6, 7, 8], found)
    with pytest.raises(AssertionError, match="ends after 3 tokens"):
        ties_of(Scripted({}, 0.0), 0, job, found, found[:3])


@LONG
@LIMIT
def test_texts_equal_those_of_generate_in_any_order_beside_any_others(
    model: Any, tokenizer: Any, smollm2: Path
) -> None:
    rng = random.Random(135)
    reference = Reference(smollm2)
    jobs = [job_of(rng, tokenizer) for _ in range(PROMPTS)]
    expected = [reference.text(each.prompt, each.most) for each in jobs]
    for part_tokens in PART_TOKENS:
        run = Run(model, slots=SLOTS, cache_tokens=SLOTS * CONTEXT, part_tokens=part_tokens)
        rows = rows_of(model, jobs, {"temperature": 0.0})
        noise = rows_of(model, [job_of(rng, tokenizer) for _ in range(NEIGHBOURS)], {"temperature": 1.0, "seed": 5})

        outcomes = run.until_done([*rows, *noise], rng, cancelled=noise[::3])

        found = [tokens_of(outcomes[row.owner]) for row in rows]
        ties = [
            tie
            for at, (job, wanted, ours) in enumerate(zip(jobs, expected, found, strict=True))
            for tie in ties_of(reference, at, job, wanted, ours)
        ]
        tokens = sum(map(len, found))
        print(f"parts of {part_tokens}: {tokens} tokens, {run.mean_running:.1f} slots busy, near-ties: {ties}")  # noqa: T201
        # A near-tie is rare: more of them would be a fault that looks like one.
        assert len(ties) <= 1 + tokens // 500
        assert run.mean_running >= BUSY
        assert run.engine.blocks_in_use == 0


@LONG
@LIMIT
def test_texts_equal_those_of_generate_if_the_number_of_threads_changes(
    model: Any, tokenizer: Any, smollm2: Path
) -> None:
    rng = random.Random(137)
    reference = Reference(smollm2)
    jobs = [job_of(rng, tokenizer) for _ in range(SLOTS)]
    expected = [reference.text(each.prompt, each.most) for each in jobs]
    rows = rows_of(model, jobs, {"temperature": 0.0})

    outcomes = Run(model, slots=SLOTS, part_tokens=128, threads=(1, 2)).until_done(rows, rng)

    found = [tokens_of(outcomes[row.owner]) for row in rows]
    ties = [
        tie
        for at, (job, wanted, ours) in enumerate(zip(jobs, expected, found, strict=True))
        for tie in ties_of(reference, at, job, wanted, ours)
    ]
    print(f"{sum(map(len, found))} tokens on changing threads, near-ties: {ties}")  # noqa: T201
    assert len(ties) <= 1 + sum(map(len, found)) // 500


@LONG
@LIMIT
def test_sampled_texts_are_the_same_alone_in_company_and_after_displacement(model: Any, tokenizer: Any) -> None:
    rng = random.Random(136)
    jobs = [Job(tokenizer(f"{at} mills in a valley: ")["input_ids"], 140) for at in range(5)]
    options = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
    alone: dict[str, Any] = {}
    for row in rows_of(model, jobs, options):
        alone |= Run(model, slots=1).until_done([row], rng)
    together = Run(model, slots=5)
    crowded = Run(model, slots=5, cache_tokens=7 * 64)

    assert together.until_done(rows_of(model, jobs, options), rng) == alone
    assert crowded.until_done(rows_of(model, jobs, options), rng) == alone
    assert crowded.displaced > 0
    assert len({outcome["text"] for outcome in alone.values()}) == 5
