"""What the exporter writes: Prometheus' conventions, every metric of the table, and what deploy/ makes of it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, generate_latest
from scrapes import Scrape
from views import WORKER

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.metrics import HISTOGRAMS, WORK, bucket_fields, sum_field
from millstream.broker.queue.metrics import decode_metrics
from millstream.broker.queue.views import ServiceView
from millstream.cli.main import main
from millstream.telemetry.exporter import ServiceCollector
from millstream.telemetry.metrics import CODES, LABELS, METRICS, REASONS, UP, Reading

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "millstream.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "millstream.rules.yaml").read_text(encoding="utf-8"))
MONITORING = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")


def reading(service: str = "docs", **fields: int) -> Reading:
    """A service whose totals are `fields`, with `__` for a colon, and whose other numbers are all 1."""
    view = ServiceView(
        name=service,
        waiting=dict.fromkeys(PRIORITIES, 1),
        held={"w1": 1},
        returned=1,
        oldest_ms=1000,
        workers=[WORKER],
        dead_letters=1,
        paused=None,
        refused={},
        unsettled=dict.fromkeys(PRIORITIES, 1),
        deadline_ms=-1000,
    )
    ones = [*(f"work:{name}" for name in WORK), *(field for name in HISTOGRAMS for field in bucket_fields(name))]
    counts = dict.fromkeys(["settled", "ok", "cached", *ones], 1)
    counts |= {sum_field(name): 1000 for name in HISTOGRAMS}
    counts |= {name.replace("__", ":"): value for name, value in fields.items()}
    totals = decode_metrics(ServiceKeys(service), {name.encode(): b"%d" % value for name, value in counts.items()})
    return Reading(view, totals, {"chat": 0.25}, "running")


def output(*readings: Reading) -> Scrape:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(lambda: list(readings)))
    return Scrape(generate_latest(registry).decode())


def families() -> Mapping[str, set[str]]:
    """The labels of each series in the output."""
    found: dict[str, set[str]] = {}
    for sample in output(reading()).samples:
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[str]:
    """All expressions of the dashboard, its variables and the rules."""
    for panel in DASHBOARD["panels"]:
        yield from [target["expr"] for target in panel["targets"]]
    for variable in DASHBOARD["templating"]["list"]:
        if isinstance(variable["query"], dict):
            yield variable["query"]["query"]
    yield from [rule["expr"] for rule in rules()]


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def test_every_metric_of_the_table_is_in_the_output_with_its_type_and_labels() -> None:
    scrape, found = output(reading()), families()

    for metric in METRICS:
        name = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        assert found[name] == {"service", metric.label} - {""}
        assert scrape.types[metric.name.removesuffix("_total")] == metric.kind
    assert found[UP] == set()


def test_names_follow_the_conventions() -> None:
    names = [metric.name for metric in METRICS]

    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch("millstream_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert ("_seconds" in metric.name) == (metric.unit == "seconds")
        assert metric.help.endswith(".")
        assert metric.label in ("", *LABELS)


def test_known_reasons_and_codes_have_a_series_before_they_occur() -> None:
    found = [(sample.name, *sample.labels.values()) for sample in output(reading()).samples]

    assert {("millstream_calls_refused_total", reason, "docs") for reason in REASONS} <= set(found)
    assert {("millstream_rows_failed_total", code, "docs") for code in CODES} <= set(found)


def test_a_histogram_has_cumulative_buckets_in_seconds() -> None:
    scrape = output(reading(inference__5=3))
    bounds = {
        each.labels["le"]: each.value for each in scrape.samples if each.name == "millstream_inference_seconds_bucket"
    }

    assert (bounds["0.001"], bounds["0.0025"], bounds["0.005"]) == (1, 2, 5)
    assert bounds["+Inf"] == scrape.value("millstream_inference_seconds_count")
    assert scrape.value("millstream_inference_seconds_sum") == pytest.approx(0.001)


def test_services_are_told_apart() -> None:
    scrape = output(reading("a", ok=3), reading("b", ok=4))

    assert scrape.by("service", "millstream_rows_answered_total") == {"a": 3, "b": 4}


def test_a_fault_of_any_kind_is_an_answer_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> list[Reading]:
        raise ValueError("odd bytes")

    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(broken))
    for _ in range(2):
        scrape = Scrape(generate_latest(registry).decode())

    assert [(each.name, each.value) for each in scrape.samples] == [(UP, 0)]
    assert [record.getMessage() for record in caplog.records] == [
        f"the services cannot be read, so {UP} is 0: ValueError: odd bytes"
    ]


def test_a_port_that_is_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["exporter", "--url", "redis://127.0.0.1:1/0", "--port", str(port)])

    assert done.exit_code == 3
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in done.stderr


# -- deploy/ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_the_dashboard_and_the_rules_use_metrics_and_labels_of_the_output(expression: str) -> None:
    found = families()
    plain = re.sub(r'"[^"]*"', "", expression)

    named = set(re.findall(r"millstream_\w+", plain))
    assert named
    assert named <= found.keys()
    labels = set().union(*(found[name] for name in named))
    for group in re.findall(r"(?:by|on) \(([\w, ]+)\)", plain):
        assert set(group.split(", ")) <= labels
    for matcher in re.findall(r"\{([^}]*)\}", plain):
        assert set(re.findall(r"(\w+)(?:=~|!=|=)", matcher)) <= labels
    assert plain.count("(") == plain.count(")")


def test_values_of_labels_that_the_rules_name_exist() -> None:
    for expression in expressions():
        for label, value in re.findall(r'(\w+)(?:=|!=)"([^"]*)"', expression):
            assert value in LABELS[label]


def test_each_rule_says_what_happens_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells
        assert place["x"] + place["w"] <= 24
        assert panel["description"].endswith(".")
        cells |= own


def test_the_guide_names_metrics_of_the_output() -> None:
    named = set(re.findall(r"`(millstream_[a-z_]+)", MONITORING))

    assert named <= {UP, *(metric.name for metric in METRICS)}
