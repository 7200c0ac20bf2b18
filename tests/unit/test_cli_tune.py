"""`millstream tune`, with the echo model: the curve, the lines to paste, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import yaml
from click.testing import CliRunner, Result

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec, load
from millstream.cli.main import main
from millstream.cli.tune import Subject, report
from millstream.worker.measuring.threads import Threads
from millstream.worker.measuring.tuning import TOKENS, Cell, measure
from millstream.worker.models.base import Model, Prepared
from millstream.worker.models.echo import EchoModel
from millstream.worker.scheduling.batcher import Budget

FILE = """\
models:
  e: {type: echo, model_name: "%s"}
  g: {type: llm, model_name: some/model}
  missing: {type: embedding, model_name: ./nowhere}
  server: {type: embedding, model_name: m, backend: tei, url: "http://localhost:1"}
services:
  echo: {model: e, runtime: {batch_size: 4, max_batch_tokens: 256}}
  generate: {model: g}
  embed: {model: missing}
  away: {model: server}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(FILE % "sleep:0.001")
    return path


def tune(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, words)])


def lines_of(result: Result) -> list[list[str]]:
    """The table's lines below its heading, as words."""
    table, _, _ = result.stdout.partition("\n\n")
    return [line.split() for line in table.splitlines()[1:]]


def test_it_shows_the_curve_and_the_lines_to_paste(file: Path) -> None:
    result = tune("echo", "--seconds", "0.5")

    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["BATCH_SIZE", "TOKENS"])
    lines = lines_of(result)
    assert len(lines) > 10
    (marked,) = [line for line in lines if line[-1] == "best"]
    chosen = yaml.safe_load(result.stdout.partition("\n\n")[2])["services"]["echo"]["runtime"]
    assert chosen == {"batch_size": int(marked[0]), "max_batch_tokens": int(marked[1])}
    assert [line[:2] for line in lines if line[-1] == "now"] == [["4", "256"]]
    assert re.search(r"^# auto, \d+ threads?(, \w+=\w+)*: ", result.stdout, re.MULTILINE)


def test_the_lines_to_paste_are_a_configuration(file: Path) -> None:
    pasted = yaml.safe_load(tune("echo", "--seconds", "0.2").stdout.partition("\n\n")[2])
    written = yaml.safe_load(file.read_text())

    written["services"]["echo"]["runtime"] = pasted["services"]["echo"]["runtime"]
    file.write_text(yaml.safe_dump(written))

    assert load(file).services["echo"].runtime.max_batch_tokens in TOKENS


def measured(rows: int, tokens: int, *rates: float, no_room: bool = False) -> Cell:
    return Cell(Budget(rows, tokens), [[Prepared(8, "")] * rows], 1.25, list(rates), no_room)


def subject(max_batch_tokens: object) -> Subject:
    runtime = Runtime.model_validate({"batch_size": 8, "max_batch_tokens": max_batch_tokens})
    spec = ServiceSpec(name="embed", model=ModelSpec(type="echo"), model_ref="m", runtime=runtime)
    return Subject(spec, EchoModel(), "cuda:0", Threads(1, {}), Budget(8, 1_024))


def test_the_curve_has_a_bar_a_spread_and_what_could_not_be_measured() -> None:
    cells = [measured(8, 1_024, 40.0, 60.0, 50.0), measured(16, 1_024, 200.0), measured(64, 4_096, no_room=True)]

    assert report(subject(1_024), [*cells, measured(64, 8_192)]).splitlines() == [
        "BATCH_SIZE  TOKENS  ROWS/S  LOW-HIGH     PADDING  ROWS/FORWARD  MS/FORWARD",
        "8           1024    50.0    40.0-60.0    1.25     8.0           160.0       ##### now",
        "16          1024    200.0   200.0-200.0  1.25     16.0          80.0        #################### best",
        "64          4096    -       -            -        -             -           out of memory",
        "64          8192    -       -            -        -             -           not measured",
        "",
        "# cuda:0, 1 thread, some limits not measured for lack of time: 4.00 times the rows/s of the present limits",
        "services:",
        "  embed:",
        "    runtime:",
        "      batch_size: 16",
        "      max_batch_tokens: 1024",
    ]


def test_limits_that_are_good_enough_are_kept_as_they_are_written() -> None:
    cells = [measured(8, 512, 99.0), measured(8, 1_024, 97.0), measured(64, 4_096, 100.0)]

    lines = report(subject("auto"), cells).splitlines()

    assert "# cuda:0, 1 thread: the present limits are within 5 % of the best" in lines
    assert lines[-2:] == ["      batch_size: 8", "      max_batch_tokens: auto"]


def test_where_there_was_time_for_nothing_it_says_so() -> None:
    assert report(subject("auto"), [measured(8, 1_024)]).endswith("# nothing was measured: give it more --seconds")


def test_json_has_every_round(file: Path) -> None:
    found = json.loads(tune("echo", "--seconds", "0.5", "--json").stdout)

    assert (found["service"], found["now"]) == ("echo", {"batch_size": 4, "max_batch_tokens": 256})
    assert found["best"] in [
        {"batch_size": each["batch_size"], "max_batch_tokens": each["max_batch_tokens"]} for each in found["measured"]
    ]
    assert all(each["padding"] >= 1 for each in found["measured"])
    assert any(each["rounds"] for each in found["measured"])


def test_it_can_measure_with_texts_of_ones_own(file: Path) -> None:
    texts = file.with_name("texts.txt")
    texts.write_text("one two\n\n水 车\n", encoding="utf-8")

    result = tune("echo", "--seconds", "0.2", "--texts", texts)

    assert result.exit_code == 0
    # Both have two words: nothing pads.
    assert {line[4] for line in lines_of(result)} <= {"1.00", "-"}


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_ctrl_c_ends_it_and_shows_what_was_measured_so_far(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: Model, cells: Sequence[Cell], seconds: float) -> Iterator[Cell]:
        yield next(measure(model, cells, 1.0))
        interrupt()

    monkeypatch.setattr("millstream.worker.measuring.tuning.measure", interrupted)

    result = tune("echo")

    assert (result.exit_code, "Traceback" in result.output) == (130, False)
    assert [line[-1] for line in lines_of(result)[:2]] == ["best", "measured"]
    assert "max_batch_tokens: 256" in result.stdout


def test_ctrl_c_before_anything_is_measured_ends_it_without_a_word(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EchoModel, "forward", interrupt)

    result = tune("echo")

    assert (result.exit_code, result.stdout, "Traceback" in result.stderr) == (130, "", False)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["ecco"], 4, "did you mean echo?"),
        (["generate"], 2, "generates"),
        (["away"], 2, "a server of its own"),
        (["embed"], 9, "no model folder 'nowhere'"),
        (["echo", "--config", "other.yaml"], 3, "other.yaml"),
        (["echo", "--texts", "empty.txt"], 2, "has no text"),
        (["echo", "--texts", "latin1.txt"], 2, "UTF-8"),
        (["echo", "--seconds", "0"], 2, "--seconds"),
        (["echo", "--seconds", "nan"], 2, "--seconds"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_cannot_be_measured_is_one_line(file: Path, words: list[str], status: int, says: str) -> None:
    file.with_name("empty.txt").write_text("\n \n")
    file.with_name("latin1.txt").write_bytes(b"caf\xe9\n")

    result = tune(*words)

    assert (result.exit_code, result.stdout) == (status, "")
    assert says in result.stderr.splitlines()[-1]


def test_a_model_whose_forward_fails_is_named(file: Path) -> None:
    file.write_text(FILE % "raise:word")

    result = tune("echo")

    assert (result.exit_code, result.stdout) == (9, "")
    assert "the model fails in its warm-up" in result.stderr.splitlines()[-1]
