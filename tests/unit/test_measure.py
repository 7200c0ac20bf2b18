"""What the benchmarks make of their numbers: medians, ratios, percentiles, tables, verdicts, the page they write."""

from __future__ import annotations

import os
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_dtypes import DTYPES, WAYS, report
from hypothesis import given
from hypothesis import strategies as st
from measure import Report, Rounds, Sample, Table, Target, cpu_s, digits, interval_of_median, percentile, verdicts
from pages import marks, renewed, write
from paired import MEASURES, Comparison, order_of
from plots import Chart

LINE = Chart("line", "Rows & seconds", "x", "y", {"ours": [(1, 10), (1_000, 90)], "theirs": [(1, 20)]}, log="x")
BARS = Chart("bars", "Texts", "", "texts/s", {"texts/s": [(0, 10), (1, 30)]}, labels=["queue", "encode"])


def test_a_sample_is_its_median_with_the_smallest_and_largest_value() -> None:
    sample = Sample((3.0, 1.0, 2.0))

    assert (sample.median, sample.low, sample.high) == (2, 1, 3)
    assert str(sample) == "2 (1-3)"


def test_a_ratio_is_taken_round_by_round() -> None:
    """The second round was four times slower for both: that is no spread of the ratio."""
    ours, theirs = Sample((100.0, 30.0)), Sample((200.0, 50.0))

    assert ours.over(theirs) == Sample((0.5, 0.6))


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="zip"):
        Sample((1.0, 2.0)).over(Sample((1.0,)))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_the_least_value_that_its_share_does_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)

    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values)


def test_the_median_of_few_values_is_known_to_an_interval_that_shrinks_with_more_of_them() -> None:
    few, many = (0.8, 0.9, 1.0, 1.1, 1.2), tuple(0.8 + 0.004 * number for number in range(101))

    (low, high), (above, below) = interval_of_median(few), interval_of_median(many)

    assert 0.8 <= low < above <= 1.0 <= below < high <= 1.2
    assert interval_of_median([1.0]) == (1.0, 1.0)


def test_each_side_of_a_pair_runs_first_in_every_other_pair() -> None:
    assert [order_of(pair)[0] for pair in range(4)] == ["old", "new", "old", "new"]
    assert all(sorted(order_of(pair)) == ["new", "old"] for pair in range(2))


@pytest.mark.parametrize(("new", "verdict"), [(100.0, "OK"), (98.0, "OK"), (90.0, "SLOWER"), (120.0, "OK")])
def test_a_checkout_is_slower_if_even_the_upper_bound_of_its_ratio_is_too_small(new: float, verdict: str) -> None:
    comparison = Comparison({}, 1.0)
    for name in (name for measures in MEASURES.values() for name in measures):
        for noise in (0.99, 1.0, 1.01):
            comparison.rounds.add(f"{name} old", 100.0)
            comparison.rounds.add(f"{name} new", new * noise)

    assert {row[-1] for row in comparison.rows()} == {verdict}


def test_there_is_no_percentile_of_nothing() -> None:
    assert str(percentile([], 0.5)) == "nan"


@pytest.mark.parametrize(
    ("value", "shown"), [(12_345.6, "12,346"), (7, "7"), (0.98765, "0.988"), (0.0, "0"), (float("nan"), "nan")]
)
def test_numbers_are_shown_with_the_digits_that_say_something(value: float, shown: str) -> None:
    assert digits(value) == shown


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("t", Sample((0.4, 0.5, 0.6)), ">=", 0.5), True),
        (Target("t", Sample((0.4, 0.49, 0.6)), ">=", 0.5), False),
        (Target("t", Sample((0.4, 0.5, 0.6)), "<=", 0.5), True),
        (Target("t", Sample((0.4, 0.51, 0.6)), "<=", 0.5), False),
        (Target("t", Sample((float("nan"),)), "<=", 0.5), False),
    ],
)
def test_a_target_is_met_by_the_median(target: Target, met: bool) -> None:
    assert target.met is met
    assert verdicts([target]).rows[0][-1] == ("met" if met else "MISSED")


def test_a_table_is_aligned_for_a_terminal_and_markdown_for_the_page() -> None:
    table = Table("Queue", ["in flight", "rows/s"], [[1, Sample((9.0, 10.0, 11.0))], [1_024, 7.5]], "A note.")

    assert table.text().splitlines()[-3:] == ["in flight     rows/s", "1          10 (9-11)", "1,024            7.5"]
    assert table.markdown().endswith("| in flight | rows/s |\n| --- | ---: |\n| 1 | 10 (9-11) |\n| 1,024 | 7.5 |")


def test_rounds_become_samples_in_their_order() -> None:
    rounds = Rounds()
    for value in (3.0, 1.0):
        rounds.add("queue rate", value)

    assert rounds.of("queue", ["rate"]) == [Sample((3.0, 1.0))]


def test_cpu_time_counts_what_a_process_works() -> None:
    before, until = cpu_s([os.getpid()]), time.thread_time() + 0.05
    while time.thread_time() < until:
        pass

    assert cpu_s([os.getpid()]) - before >= 0.04


@pytest.mark.parametrize("chart", [LINE, BARS], ids=lambda chart: chart.name)
def test_a_chart_is_an_svg_that_shows_each_point_inside_its_frame(chart: Chart) -> None:
    root = ElementTree.fromstring(chart.svg())
    kind, x, y = ("rect", "x", "y") if chart.labels else ("circle", "cx", "cy")
    marks = [each.attrib for each in root.iter(f"{{http://www.w3.org/2000/svg}}{kind}") if x in each.attrib]

    assert len(marks) == sum(len(points) for points in chart.series.values())
    assert all(0 <= float(mark[x]) <= 640 and 0 <= float(mark[y]) <= 360 for mark in marks)


def test_the_higher_value_stands_higher() -> None:
    root = ElementTree.fromstring(LINE.svg())

    ours, theirs = (line.attrib["points"].split() for line in root.iter("{http://www.w3.org/2000/svg}polyline"))

    low, high, other = (float(point.split(",")[1]) for point in (*ours, *theirs))
    assert low > other > high


def test_a_run_renews_what_its_suite_measured_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    (begin, end), (other, others_end) = marks("queue"), marks("embed")
    mine, rest = "# Performance\n\n## Findings\n\nMine.", f"{other}\n\nkept\n\n{others_end}\n\nThe end.\n"
    page.write_text(f"{mine}\n\n{begin}\n\nold\n\n{end}\n\n{rest}")
    report = Report([Table("Queue", ["a"], [[1]])], [Target("fast", Sample((1.0,)), ">=", 0.5)], [LINE])

    for _ in range(2):
        write(page, {"machine": "2 cores"}, "queue", report)

    text = page.read_text()
    assert text.startswith(f"{mine}\n\n{begin}\n\n- machine: 2 cores\n\n### Targets")
    assert text.endswith(f"![Rows & seconds](performance/line.svg)\n\n{end}\n\n{rest}")
    assert "old" not in text
    assert (tmp_path / "performance" / "line.svg").read_text() == LINE.svg()


def test_dtypes_are_compared_with_plain_encode_in_float32_round_by_round() -> None:
    rounds = Rounds({"cosine": [0.9991]})
    for place, name in enumerate(f"{dtype} {way}" for dtype in DTYPES for way in WAYS):
        rounds.values |= {f"{name} rate": [place + 1.0, 10.0], f"{name} cpu": [7.0, 7.0]}

    (table,), (target,) = (found := report(rounds, 2)).tables, found.targets

    assert [row[0] for row in table.rows][3::4] == [f"{dtype}: {WAYS['encode 32']}" for dtype in DTYPES]
    assert [row[3] for row in table.rows] == [Sample((place / 4, 1.0)) for place in range(1, 9)]
    assert target.met


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks"):
        renewed(f"{marks('queue')[0]} but no end", "queue", "text")
