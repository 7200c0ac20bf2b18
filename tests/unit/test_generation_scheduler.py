"""A forward computes the next token of each growing text, and parts of prompts that do not delay them for long."""

from __future__ import annotations

from dataclasses import dataclass, field

from millstream.worker.generation.scheduler import (
    LEAST_PART,
    MAX_STEP_MS,
    MOST_PASSED,
    MOST_STRETCH,
    PartSize,
    before_others,
    note_passed,
    plan,
    waiting,
)


@dataclass
class Text:
    length: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    rank: int = 1
    passed: int = 0


def test_growing_texts_come_first_by_their_blocks_and_the_shortest_prompts_share_the_rest() -> None:
    long, short = Text(200, 199, [1, 2, 3, 4]), Text(5, 4, [5])
    first, second, third = Text(100, 0, [6, 7]), Text(100, 30, [8, 9]), Text(50, 0, [10])

    pieces = plan([first, long, second, short, third], 150)

    assert [(piece.text, piece.first, piece.end) for piece in pieces] == [
        (short, 4, 5),
        (long, 199, 200),
        (third, 0, 50),
        (second, 30, 100),
        (first, 0, 30),
    ]
    assert [piece.gives_token for piece in pieces] == [True, True, True, True, False]


def test_a_more_urgent_prompt_comes_before_a_shorter_one() -> None:
    shorter, urgent = Text(20, rank=2), Text(60, rank=1)

    assert [(piece.text, piece.end) for piece in plan([shorter, urgent], 70)] == [(urgent, 60)]


def test_a_prompt_is_not_begun_beside_prompts_whose_first_token_it_would_delay() -> None:
    short, long = Text(40), Text(100)

    assert [(piece.text, piece.end) for piece in plan([long, short], 70)] == [(short, 40)]
    assert [(piece.text, piece.end) for piece in plan([long], 70)] == [(long, 70)]


def test_a_prompt_that_nearly_fits_is_not_cut() -> None:
    part, short = Text(86), Text(40)

    assert [piece.end for piece in plan([part], 80)] == [86]
    assert [piece.end for piece in plan([part], 76)] == [76]
    # Less than half of it fits, so it is cheaper to wait.
    assert [piece.end for piece in plan([short, part], 120)] == [40, 86]
    assert [piece.end for piece in plan([short, part], 82)] == [40]


def test_a_prompt_that_shorter_ones_pass_is_computed_after_a_bounded_number_of_forwards() -> None:
    long, texts = Text(500), []
    forwards = 0
    while not long.computed:
        texts = [long, Text(30), Text(30)]
        pieces = plan(texts, 64)
        note_passed(texts, pieces)
        for piece in pieces:
            piece.text.computed = piece.end
        forwards += 1

    assert forwards == MOST_PASSED + 1


def test_prompts_wait_that_are_as_urgent_as_the_texts_that_grow() -> None:
    chat, prompt, bulk = Text(9, 8, rank=0), Text(40, rank=0), Text(40, rank=2)

    assert waiting([chat, prompt, bulk]) == 1
    assert waiting([prompt, bulk]) == 2
    assert waiting([Text(9, 8, rank=2), bulk]) == 1


def test_a_forward_may_take_longer_if_more_texts_wait_for_their_first_token_than_grow() -> None:
    size = PartSize()
    for _ in range(50):
        size.observe(8, 0, 0.020)
        size.observe(8, 200, 0.020 + 200 * 0.0005)

    assert abs(size.tokens(8, 8) - (2 * MAX_STEP_MS / 1000 - 0.020) / 0.0005) < 5
    assert abs(size.tokens(8, 80) - (MOST_STRETCH * MAX_STEP_MS / 1000 - 0.020) / 0.0005) < 5


def test_short_parts_hardly_change_what_long_ones_have_shown() -> None:
    size = PartSize()
    size.observe(0, 600, 0.300)
    for _ in range(3):
        size.observe(0, 20, 0.050)

    assert size.token_s < 0.0007


def test_a_part_of_one_token_runs_with_the_growing_texts() -> None:
    growing, prompt, other = Text(65, 64, [1, 2]), Text(10, 0, [3]), Text(9, 0, [4])

    pieces = plan([growing, prompt, other], 10)

    assert [(piece.text, piece.grows, piece.gives_token) for piece in pieces] == [
        (prompt, True, False),
        (growing, True, True),
        (other, False, True),
    ]


def test_parts_take_no_longer_than_growing_texts_may_wait() -> None:
    size = PartSize()
    for _ in range(50):
        size.observe(8, 0, 0.020)
        size.observe(8, 200, 0.020 + 200 * 0.0005)

    assert abs(size.tokens(8) - (MAX_STEP_MS / 1000 - 0.020) / 0.0005) < 5
    assert abs(size.tokens(0) - MOST_STRETCH * MAX_STEP_MS / 1000 / 0.0005) < 5


def test_a_slow_device_still_computes_prompts() -> None:
    size = PartSize()
    size.observe(8, 0, 3.0)
    size.observe(8, 32, 6.0)

    assert size.tokens(8) == LEAST_PART
    assert size.tokens(8, 4) == 1.5 * LEAST_PART
    assert size.tokens(8, 80) == size.tokens(0) == MOST_STRETCH * LEAST_PART


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
