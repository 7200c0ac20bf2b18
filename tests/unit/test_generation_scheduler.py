"""A forward computes the next token of each growing text, and parts of prompts that do not delay them for long."""

from __future__ import annotations

from dataclasses import dataclass, field

from millstream.worker.generation.scheduler import (
    LEAST_PART,
    MAX_PREFILL_MS,
    MAX_STEP_MS,
    MOST_PART,
    PartSize,
    before_others,
    plan,
)


@dataclass
class Text:
    length: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    rank: int = 1


def test_growing_texts_come_first_by_their_blocks_and_prompts_share_the_rest() -> None:
    long, short = Text(200, 199, [1, 2, 3, 4]), Text(5, 4, [5])
    first, second, third = Text(100, 0, [6, 7]), Text(100, 30, [8, 9]), Text(50, 0, [10])

    pieces = plan([first, long, second, short, third], 150)

    assert [(piece.text, piece.first, piece.end) for piece in pieces] == [
        (short, 4, 5),
        (long, 199, 200),
        (first, 0, 100),
        (second, 30, 80),
    ]
    assert [piece.gives_token for piece in pieces] == [True, True, True, False]


def test_a_part_of_one_token_runs_with_the_growing_texts() -> None:
    prompt, other = Text(10, 0, [1]), Text(9, 0, [2])

    pieces = plan([prompt, other], 11)

    assert [(piece.text, piece.grows, piece.gives_token) for piece in pieces] == [
        (other, True, False),
        (prompt, False, True),
    ]


def test_parts_take_no_longer_than_growing_texts_may_wait() -> None:
    size = PartSize()
    for _ in range(50):
        size.observe(8, 0, 0.020)
        size.observe(8, 200, 0.020 + 200 * 0.0005)

    assert abs(size.tokens(8) - (MAX_STEP_MS / 1000 - 0.020) / 0.0005) < 5
    assert size.tokens(0) == int(MAX_PREFILL_MS / 1000 / 0.0005) or size.tokens(0) == MOST_PART


def test_a_slow_device_still_computes_prompts() -> None:
    size = PartSize()
    size.observe(8, 0, 3.0)
    size.observe(8, 32, 6.0)

    assert size.tokens(8) == LEAST_PART


def test_a_limit_of_parts_holds_from_the_first_forward() -> None:
    size = PartSize(most=7)

    assert size.tokens(0) == size.tokens(3) == 7
    size.observe(0, 7, 0.001)
    assert size.tokens(0) == size.tokens(3) == 7


def test_the_time_of_few_growing_texts_is_a_part_of_that_of_many() -> None:
    size = PartSize()
    for _ in range(50):
        size.observe(16, 0, 0.080)
        size.observe(0, 100, 0.050)

    assert abs(size.tokens(2) - (MAX_STEP_MS / 1000 - 0.010) / 0.0005) < 5
    assert size.tokens(16) == int((MAX_STEP_MS / 1000 - 0.080) / 0.0005)


def test_less_urgent_texts_wait_while_a_realtime_prompt_is_computed() -> None:
    prompt, chat, share = Text(50, 10, rank=0), Text(9, 8, rank=0), Text(8, 7, rank=-1)
    normal, batch = Text(20, 0, rank=1), Text(10, 9, rank=2)
    texts = [share, prompt, chat, normal, batch]

    assert before_others(texts) == [share, prompt, chat]
    prompt.computed = 49
    assert before_others(texts) == texts
    assert before_others([normal, batch]) == [normal, batch]
