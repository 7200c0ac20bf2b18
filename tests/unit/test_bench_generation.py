"""The benchmark of text generation sends the same load each time, and its ways generate the same texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench_generation import COUNT, LEAST, MOST, WAYS, Cell, Choice, made, note, spec_of, table, targets
from bench_generation_smollm2 import REAL
from local_generation import Request, Times, ways
from measure import Rounds, Sample
from tiny_llama import VOCABULARY, save_tiny_llama


def test_the_load_is_the_same_each_time_and_within_its_bounds() -> None:
    short, long = made("tiny", "short", False), made("tiny", "384", False)

    assert short == made("tiny", "short", False)
    assert len(short) == COUNT
    assert all(LEAST <= each.tokens <= MOST and 16 <= len(each.prompt) <= 64 for each in short)
    assert {len(each.prompt) for each in long} == {384}
    assert max(max(each.prompt) for each in short) < VOCABULARY
    assert len({tuple(each.prompt[:4]) for each in short}) == COUNT


def test_options_choose_a_part_of_the_suite() -> None:
    assert Choice().but({}) == Choice()
    assert Choice().but({"contexts": "384", "threads": "1,2", "dtype": "float32,bfloat16"}) == Choice(
        "tiny", ["float32", "bfloat16"], (1, 2), ["384"]
    )
    assert REAL.but({"place": "alone", "openvino": "python"}) == replace(REAL, places=["alone"], openvino="python")


@pytest.mark.filterwarnings("ignore")
def test_all_ways_without_a_queue_generate_the_same_texts(tmp_path: Path) -> None:
    known = ways(spec_of("tiny", str(save_tiny_llama(tmp_path)), "float32"), 1)
    requests = [Request(each.prompt, 3 + at) for at, each in enumerate(made("tiny", "short", True))]

    found = {way: generate(requests) for way, generate in known.items()}

    assert {"static", "manager"} <= set(found)
    assert [way for way, times in found.items() if times.text != found["static"].text] == []
    for times in found.values():
        assert all(0 < first <= last <= times.seconds for first, last in zip(times.first, times.last, strict=True))


def test_the_table_compares_round_by_round_with_static_batches() -> None:
    rounds, requests = Rounds(), [Request([1], 10), Request([1], 30)]
    cell = Cell("smollm2", "float32", 1, "short", "alone")
    for way, seconds in zip(WAYS, (4.0, 2.0, 1.0, 0.5, 0.5), strict=True):
        for _ in range(2):
            note(rounds, f"{cell.name} {way}", requests, Times(seconds, [0.5, 1.0], [1.0, seconds]))
            rounds.add(f"{cell.name} {way} same", 1.0)

    made_table = table(rounds, cell, list(WAYS))

    assert [row[2] for row in made_table.rows] == [Sample((4.0 / s, 4.0 / s)) for s in (4.0, 2.0, 1.0, 0.5, 0.5)]
    assert made_table.rows[0][1] == Sample((10.0, 10.0))
    assert [each.met for each in targets(rounds, cell.name, list(WAYS))] == [True, True, True, True]
    assert targets(rounds, cell.name, ["static", "manager"]) == []
