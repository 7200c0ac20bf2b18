"""The engine of language models gives the texts of transformers' `generate`, whatever runs beside them."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from generating import Job, Run, load, rows_of, tokens_of

from millstream.broker.contract.errors import ModelFailed
from millstream.worker.generation.blocks import BlockPool
from millstream.worker.scheduling.active_job import Rows

Folders = Mapping[str, Path]
KINDS = ("llama", "grouped", "qwen3", "gpt2")

JOBS = 64 if os.environ.get("MILLSTREAM_LONG") == "1" else 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    import language_models

    home = tmp_path_factory.mktemp("language-models")
    saved = {kind: language_models.save_language_model(home / kind, kind) for kind in KINDS}
    return saved | {"long": language_models.save_language_model(home / "long", "grouped", context=1_024)}


@pytest.fixture(scope="module")
def model(folders: Folders) -> Any:
    return load(folders["grouped"])


def rows_free(run: Run) -> int:
    room = run.engine.room()
    assert room
    return room.rows


@pytest.mark.parametrize("kind", KINDS)
def test_texts_equal_those_of_generate_in_any_order_beside_any_others(folders: Folders, kind: str) -> None:
    import language_models

    reference = language_models.load_reference(folders[kind])
    rng = random.Random(kind)
    jobs = [Job.random(rng, most=rng.randrange(1, 32)) for _ in range(JOBS)]
    expected = [language_models.reference_text(reference, each.prompt, each.most) for each in jobs]
    model = load(folders[kind])
    for part_tokens, cache_tokens in ((7, 8_192), (16, 2_048), (128, 4_096)):
        run = Run(model, slots=20, cache_tokens=cache_tokens, part_tokens=part_tokens)
        rows = rows_of(model, jobs, {"temperature": 0.0})
        noise = rows_of(model, [Job.random(rng, most=20) for _ in range(16)], {"temperature": 1.0, "seed": 5})

        outcomes = run.until_done([*rows, *noise], rng, cancelled=noise[::3])

        assert [tokens_of(outcomes[row.owner]) for row in rows] == expected
        assert run.mean_running >= 8
        assert run.engine.blocks_in_use == 0


def test_a_sampled_text_is_the_same_alone_in_company_and_after_displacement(model: Any) -> None:
    rng = random.Random(1)
    jobs = [Job.random(rng, tokens=rng.choice((3, 10)), most=150) for _ in range(8)]
    options = {"temperature": 1.3, "ignore_eos": True}

    def rows() -> list[Any]:
        return rows_of(model, jobs, options)

    alone: dict[str, Any] = {}
    for row in rows():
        alone |= Run(model, slots=1).until_done([row], rng)
    together = Run(model, slots=8)
    crowded = Run(model, slots=8, cache_tokens=512)

    assert together.until_done(rows(), rng) == alone
    assert crowded.until_done(rows(), rng) == alone
    assert crowded.displaced > 3
    assert together.displaced == 0


def test_a_text_is_the_same_if_the_number_of_threads_changes(model: Any) -> None:
    rng = random.Random(4)
    jobs = [Job.random(rng, tokens=rng.choice((3, 150)), most=60) for _ in range(8)]
    samplings: Sequence[Mapping[str, Any]] = ({"temperature": 0.0}, {"temperature": 1.3, "seed": 7})

    for options in samplings:
        on_one = Run(model, slots=8, part_tokens=64).until_done(rows_of(model, jobs, options), rng)
        on_others = Run(model, slots=8, part_tokens=64, threads=(1, 2, 3)).until_done(
            rows_of(model, jobs, options), rng
        )
        assert on_others == on_one


def test_a_successor_goes_on_behind_the_records(model: Any) -> None:
    rng = random.Random(2)
    job = Job.random(rng, most=40)
    options = {"temperature": 1.0, "ignore_eos": True, "seed": 9}
    (whole,) = Run(model).until_done(rows_of(model, [job], options), rng).values()
    (first,) = rows_of(model, [job], options)
    run = Run(model)
    run.engine.admit([first])
    records = [record for _ in range(20) for _, record in run.engine.step().records]
    run.engine.abort([first])

    (second,) = rows_of(model, [job], options, records=records)

    assert 0 < len(records) < 40
    (outcome,) = Run(model).until_done([second], rng).values()
    assert outcome == whole
    assert run.engine.blocks_in_use == 0
    assert not run.engine.busy


def test_a_text_that_had_ended_in_its_records_ends_without_a_forward(model: Any) -> None:
    rng = random.Random(3)
    job = Job.random(rng, most=5)
    run = Run(model)
    (row,) = rows_of(model, [job], {"ignore_eos": True})
    run.engine.admit([row])
    records: list[Any] = []
    done: list[Any] = []
    while not done:
        step = run.engine.step()
        records += [record for _, record in step.records]
        done = list(step.outcomes)
    (again,) = rows_of(model, [job], {"ignore_eos": True}, records=records)
    fresh = Run(model)
    fresh.engine.admit([again])

    step = fresh.engine.step()

    assert [cast(dict[str, Any], each)["text"] for each in step.outcomes] == [each["text"] for each in done]
    assert fresh.engine.forwards == 0


def test_a_text_that_fills_the_whole_cache_alone_ends_with_length(model: Any) -> None:
    rng = random.Random(4)
    (row,) = rows_of(model, [Job.random(rng, tokens=100, most=400)], {"ignore_eos": True})

    (outcome,) = Run(model, cache_tokens=128).until_done([row], rng).values()

    assert outcome["finish_reason"] == "length"
    assert len(tokens_of(outcome)) == 29


def test_a_fault_of_one_text_ends_no_other(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    jobs = [Job.random(rng, tokens=20, most=10) for _ in range(4)]
    rows = rows_of(model, jobs, {"ignore_eos": True})
    good = Run(model).until_done(rows_of(model, jobs, {"ignore_eos": True}), rng)
    sequence = cast(Any, rows[1].payload.features)
    add = sequence.add

    def fails(token: Any) -> Any:
        if sequence.generated == 4:
            raise RuntimeError("broken")
        return add(token)

    monkeypatch.setattr(sequence, "add", fails)
    run = Run(model)
    outcomes = run.until_done(rows, rng)

    failed = outcomes.pop(rows[1].owner)
    good.pop(rows[1].owner)
    assert isinstance(failed, ModelFailed)
    assert "broken" in str(failed)
    assert outcomes == good
    assert run.engine.blocks_in_use == 0


def test_a_text_with_nan_in_its_keys_spoils_no_block(folders: Folders) -> None:
    import torch

    model = load(folders["llama"])
    rng = random.Random(6)
    # A short text beside a long one has masked places, in blocks that the bad one had filled with NaN.
    jobs = [Job.random(rng, tokens=tokens, most=10) for tokens in (66, 115, 66, 115)]
    good = Run(model).until_done(rows_of(model, jobs, {"ignore_eos": True}), rng)
    weights = model._model.get_input_embeddings().weight
    bad = Job([7] * 127, 5)
    assert all(7 not in job.prompt for job in jobs)
    run = Run(model, slots=2, cache_tokens=512)
    before = weights[7].clone()
    with torch.no_grad():
        weights[7] = float("nan")
    rows = rows_of(model, [bad, *jobs], {"ignore_eos": True, "logit_bias": {"7": -100.0}})
    for row, job in zip(rows[1:], rows_of(model, jobs, {"ignore_eos": True}), strict=True):
        row.payload.features = job.payload.features

    outcomes = run.until_done(rows[:1], rng)
    run.engine.admit(rows[1:])
    outcomes |= run.until_done([], rng)
    with torch.no_grad():
        weights[7] = before

    assert isinstance(outcomes[rows[0].owner], ModelFailed)
    assert [outcomes[row.owner]["text"] for row in rows[1:]] == [good[str(at)]["text"] for at in range(4)]


def test_out_of_memory_displaces_the_youngest_and_lowers_the_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    jobs = [Job.random(rng, tokens=60, most=60) for _ in range(8)]
    options = {"temperature": 1.0, "ignore_eos": True}
    good = Run(model, slots=8).until_done(rows_of(model, jobs, options), rng)
    run = Run(model, slots=8, cache_tokens=2_048)
    forward = run.engine._forward
    plain, calls = forward.run, [0]

    def fails_sometimes(spans: Any) -> Any:
        calls[0] += 1
        if calls[0] in (3, 20):
            raise MemoryError("no memory")
        return plain(spans)

    monkeypatch.setattr(forward, "run", fails_sometimes)

    assert run.until_done(rows_of(model, jobs, options), rng) == good
    assert run.displaced >= 4
    assert run.engine._holding.pool.most < 2_048 // 64


def test_without_memory_the_copies_of_growing_texts_are_freed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    rng = random.Random(7)
    run = Run(model, slots=8)
    run.engine.admit(rows_of(model, [Job.random(rng, tokens=60, most=60) for _ in range(8)], {"ignore_eos": True}))
    for _ in range(4):
        run.engine.step()

    def copied_bytes() -> int:
        kept = vars(run.engine._forward._columns).values()
        return sum(each.untyped_storage().nbytes() for each in kept if isinstance(each, torch.Tensor))

    assert copied_bytes() > 0

    def fails(spans: Any) -> Any:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(run.engine._forward, "run", fails)
        assert run.engine.step().displaced

    assert copied_bytes() == 0
    assert run.until_done([], rng)


def test_a_text_that_runs_out_of_memory_alone_fails(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(8)
    (row,) = rows_of(model, [Job.random(rng)], {})
    run = Run(model)

    def fails(spans: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(run.engine._forward, "run", fails)
    (outcome,) = run.until_done([row], rng).values()

    assert isinstance(outcome, ModelFailed)
    assert run.engine.blocks_in_use == 0


def test_prompts_are_computed_in_parts_again_after_a_text_ran_out_of_memory_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(8)
    first, second = rows_of(model, [Job.random(rng, tokens=60, most=1), Job.random(rng, tokens=60, most=1)], {})
    run = Run(model)

    def fails(spans: Any) -> Any:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(run.engine._forward, "run", fails)
        run.until_done([first], rng)
    run.until_done([second], rng)

    assert run.engine.forwards <= 2


def test_texts_with_the_same_beginning_compute_it_once_though_blocks_are_evicted(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["long"])
    rng = random.Random(9)
    systems = [Job.random(rng, tokens=500).prompt for _ in range(3)]
    # Prompt and text fill the block behind the last shared one, so each text leaves a block with a name of its own.
    jobs = [Job(systems[at % 3] + Job.random(rng, tokens=20).prompt, 20) for at in range(36)]
    with monkeypatch.context() as patch:
        patch.setattr(BlockPool, "match", lambda pool, keys: [])
        without = Run(model, slots=4, cache_tokens=36 * 64)
        expected = without.until_done(rows_of(model, jobs, {"ignore_eos": True}), random.Random(9))
    evicted: list[BlockPool] = []
    plain = BlockPool._evict

    def evict(pool: BlockPool) -> int:
        evicted.append(pool)
        return plain(pool)

    monkeypatch.setattr(BlockPool, "_evict", evict)
    # Three beginnings of seven blocks, and four texts with two blocks of their own: none is left for ended texts.
    run = Run(model, slots=4, cache_tokens=29 * 64)

    outcomes = run.until_done(rows_of(model, jobs, {"ignore_eos": True}), random.Random(9))

    assert outcomes == expected
    assert without.engine.prefilled >= 36 * 520
    assert run.engine.prefilled <= 0.3 * without.engine.prefilled
    assert run.cached >= 0.7 * 36 * 520
    assert len(evicted) >= 30


def test_a_prefix_is_not_evicted_by_the_text_that_shares_it(model: Any) -> None:
    rng = random.Random(13)
    system = Job.random(rng, tokens=256).prompt
    first, second = (Job(system + Job.random(rng, tokens=20).prompt, 3) for _ in range(2))
    # Five blocks: the second text has none but those of the first.
    run = Run(model, slots=1, cache_tokens=5 * 64)

    run.until_done(rows_of(model, [first], {"ignore_eos": True}), rng)
    run.until_done(rows_of(model, [second], {"ignore_eos": True}), rng)

    assert run.engine.prefilled == 256 + 20 + 20


def test_a_prompt_that_a_smaller_cache_cannot_hold_fails(model: Any) -> None:
    rng = random.Random(14)
    (row,) = rows_of(model, [Job.random(rng, tokens=100)], {})
    run = Run(model, cache_tokens=64)

    (outcome,) = run.until_done([row], rng).values()

    assert isinstance(outcome, ModelFailed)
    assert "100 tokens, and the cache now holds 64" in str(outcome)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128])
def test_a_text_that_the_room_is_enough_for_starts_in_the_next_step(model: Any, tokens: int) -> None:
    rng = random.Random(16)
    first, second = rows_of(model, [Job.random(rng, tokens=100, most=20), Job.random(rng, tokens=tokens)], {})
    starts = []
    for blocks in range(3, 9):
        run = Run(model, cache_tokens=64 * blocks)
        run.engine.admit([first])
        run.engine.step()
        room = run.engine.room()
        assert room
        if room.rows > 0 and room.tokens >= tokens:
            run.engine.admit([second])
            run.engine.step()
            starts.append(not run.engine._holding.waiting)
        run.engine.abort([first, second])

    assert starts
    assert all(starts)


def test_an_urgent_prompt_is_computed_before_the_rest_of_a_less_urgent_one(model: Any) -> None:
    rng = random.Random(17)
    long, urgent = rows_of(model, [Job.random(rng, tokens=400, most=1), Job.random(rng, tokens=20, most=1)], {})
    urgent.urgency = (0, 1)
    run = Run(model, part_tokens=32)
    run.engine.admit([long])
    run.engine.step()
    run.engine.admit([urgent])

    assert run.engine.step().rows == [urgent]


def test_batch_texts_wait_for_a_realtime_prompt_but_not_for_ever(model: Any) -> None:
    rng = random.Random(18)
    batch, urgent = rows_of(model, [Job.random(rng, tokens=20, most=40), Job.random(rng, tokens=400, most=1)], {})
    batch.urgency, urgent.urgency = (2, 0), (0, 1)
    run = Run(model, part_tokens=32)
    run.engine.admit([batch])
    run.engine.step()
    run.engine.admit([urgent])

    grown: list[int] = []
    ended: Rows = []
    while not ended:
        before = batch.payload.features.generated  # type: ignore[attr-defined]
        ended = run.engine.step().rows
        grown.append(batch.payload.features.generated - before)  # type: ignore[attr-defined]

    assert ended == [urgent]
    assert grown == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("steps", [3, 58, 70], ids=["first block", "full block", "second block"])
def test_a_displaced_text_that_comes_back_computes_nothing_again(model: Any, steps: int) -> None:
    rng = random.Random(19)
    job = Job.random(rng, tokens=7, most=90)
    options = {"temperature": 1.0, "ignore_eos": True}
    (alone,), (row,) = rows_of(model, [job], options), rows_of(model, [job], options)
    expected = Run(model).until_done([alone], rng)
    run = Run(model)
    run.engine.admit([row])
    for _ in range(steps):
        run.engine.step()
    before = run.engine.prefilled

    run.engine.abort([row])
    outcomes = run.until_done([row], rng)

    assert tokens_of(outcomes[row.owner]) == tokens_of(expected[row.owner])
    assert run.engine.prefilled == before


def test_conclude_gives_what_there_is_and_frees_the_blocks(model: Any) -> None:
    rng = random.Random(10)
    rows = rows_of(model, [Job.random(rng, tokens=70, most=50) for _ in range(2)], {"ignore_eos": True})
    run = Run(model)
    run.engine.admit(rows)
    shown = [record.text for _ in range(12) for row, record in run.engine.step().records if row is rows[0]]

    (outcome,) = run.engine.conclude([rows[0]], "deadline")

    value = cast(dict[str, Any], outcome)
    assert value["finish_reason"] == "deadline"
    assert value["text"].startswith("".join(shown))
    assert value["usage"][:2] == [70, len(shown)]
    assert len(shown) > 5
    run.engine.abort([rows[1]])
    assert run.engine.blocks_in_use == 0
    assert not run.engine.busy


def test_a_text_that_is_concluded_late_keeps_the_reason_of_its_end(model: Any) -> None:
    rng = random.Random(3)
    job = Job.random(rng, most=5)
    run = Run(model)
    run.engine.admit(rows_of(model, [job], {"ignore_eos": True}))
    records = [record for _ in range(8) if run.engine.busy for _, record in run.engine.step().records]
    (again,) = rows_of(model, [job], {"ignore_eos": True}, records=records)
    run.engine.admit([again])

    (outcome,) = run.engine.conclude([again], "deadline")

    assert cast(dict[str, Any], outcome)["finish_reason"] == "length"


@pytest.mark.parametrize("at", range(4))
def test_no_block_gets_the_name_of_another_if_memory_runs_out_while_they_move(
    model: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    from millstream.worker.generation import kv_cache

    rng = random.Random(15)
    jobs = [Job.random(rng, tokens=150, most=12) for _ in range(4)]
    options = {"temperature": 0.0, "ignore_eos": True}
    good = Run(model, slots=4).until_done(rows_of(model, jobs, options), rng)
    run = Run(model, slots=4)
    run.until_done(rows_of(model, [Job.random(rng, tokens=200, most=1)], options), rng)
    run.engine.admit(rows_of(model, jobs, options))
    for _ in range(8):
        run.engine.step()
    forward = run.engine._forward
    plain = kv_cache._resized
    resizes = [0]

    def no_memory(*_: Any) -> Any:
        raise MemoryError("no memory")

    def resized_until(*arguments: Any) -> Any:
        resizes[0] += 1
        return no_memory() if resizes[0] > at else plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(forward, "run", no_memory)
        patch.setattr(kv_cache, "_resized", resized_until)
        assert len(run.engine.step().displaced) == 2
    run.engine.abort([held.row for held in run.engine._holding.all])

    assert run.engine.blocks_in_use == 0
    assert run.until_done(rows_of(model, jobs, options), rng) == good


def test_all_slots_and_blocks_are_returned_over_many_lives(model: Any) -> None:
    rng = random.Random(11)
    run = Run(model, slots=16, cache_tokens=3_000)
    waiting = rows_of(
        model, [Job.random(rng, tokens=rng.choice((1, 3, 10, 70)), most=rng.randrange(1, 7)) for _ in range(2_000)], {}
    )
    ended = 0
    while waiting or run.engine.busy:
        room = run.engine.room()
        while waiting and room and room.rows > 0 and rng.random() < 0.8:
            run.engine.admit([waiting.pop()])
            room = run.engine.room()
        step = run.engine.step()
        waiting += step.displaced
        ended += len(step.rows)
        held = [each.row for each in run.engine._holding.all]
        if held and rng.random() < 0.2:
            row = rng.choice(held)
            ended += 1
            if rng.random() < 0.5:
                run.engine.abort([row])
            else:
                assert run.engine.conclude([row], "deadline")

    assert ended == 2_000
    assert run.engine.blocks_in_use == 0
    assert run.engine._holding.pool.available == 3_000 // 64
    assert rows_free(run) == 16


def test_a_lower_limit_displaces_texts_and_a_higher_one_admits_more(model: Any) -> None:
    rng = random.Random(12)
    rows = rows_of(model, [Job.random(rng, tokens=60, most=40) for _ in range(4)], {"ignore_eos": True})
    run = Run(model, slots=4, cache_tokens=1_024)
    run.engine.admit(rows)
    run.engine.step()
    run.engine.limit(4, 128)

    step = run.engine.step()
    displaced = [*step.displaced, *(row for _ in range(10) for row in run.engine.step().displaced)]

    assert displaced == list(reversed(rows[4 - len(displaced) :]))
    assert run.engine.blocks_in_use <= 2
    run.engine.limit(9, 4_096)
    run.engine.step()
    assert rows_free(run) == 9 - (4 - len(displaced))
