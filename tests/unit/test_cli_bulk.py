"""The progress line of `millstream bulk`, and the command that goes on."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import eventually

from millstream.cli import bulk_progress
from millstream.cli.bulk import bulk
from millstream.cli.bulk_progress import GAP, Display, describe, fit
from millstream.client import BulkProgress, Client
from millstream.client.bulk.progress import Pace

HALF = BulkProgress(Path("out"), 1_234_567, 20, 0.5, 1234.4, 100.0, 2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_has_rows_rate_time_failures_and_workers() -> None:
    line = "1,234,567 rows 50%  1,234 rows/s  eta 1m00s  20 failed  2 workers"
    assert GAP.join(describe(HALF, 40.0)) == line
    assert GAP.join(describe(BulkProgress(Path("out"), 1, 0, 0.0), 0.0)) == "1 row 0%  0 failed  no worker"
    assert fit(describe(HALF, 40.0), 79) == line


@pytest.mark.parametrize("columns", [5, 18, 19, 40, 79, 160])
def test_a_narrow_terminal_gets_whole_parts_in_one_line(columns: int) -> None:
    parts = describe(HALF, 40.0)

    line = fit(parts, columns)

    assert len(line) <= columns
    assert line in (parts[0][:columns], *(GAP.join(parts[:count]) for count in range(1, 6)))
    assert columns < 79 or line == GAP.join(parts)


@pytest.mark.parametrize(
    "words",
    [
        [
            "run",
            "my texts.jsonl",
            "-o",
            "out 1",
            "--service",
            "chat",
            "--option",
            'stop=["\\n", "it\'s"]',
            "--shard",
            "1/8",
        ],
        ["retry-failed", "out 1", "--window", "64"],
    ],
)
def test_an_interrupted_command_ends_with_130_and_is_printed_in_full_and_quoted(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLSTREAM_REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setattr(sys, "argv", ["millstream", "bulk", *words])
    monkeypatch.setattr(Client, "bulk", interrupt)
    monkeypatch.setattr(Client, "retry_failed", interrupt)
    Path("my texts.jsonl").touch()
    Path("out 1").mkdir()

    ended = CliRunner().invoke(bulk, words)

    assert ended.exit_code == 130
    command = ended.stderr.partition("To go on: ")[2]
    assert shlex.split(command) == ["millstream", "bulk", *words]


def test_rate_and_time_are_of_this_process_alone() -> None:
    progress = Pace(Path("out"), rows=1_000, share=0.5, began=10.0).measure(1_100, 3, 0.6, 1, now=20.0)

    assert (progress.rate, progress.rows, progress.failed) == (10.0, 1_100, 3)
    assert progress.eta_s == pytest.approx(40.0)


def test_a_terminal_gets_one_line_that_changes_and_a_log_none_before_its_time() -> None:
    terminal, log = Terminal(), io.StringIO()
    for out in (terminal, log):
        with Display(out) as display:
            display.show(HALF)

    assert terminal.getvalue().startswith("\r1,234,567 rows")
    assert terminal.getvalue().endswith("\x1b[K\n")
    assert terminal.getvalue().count("\n") == 1
    assert log.getvalue() == ""


def test_a_log_gets_a_line_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_progress, "LOG_S", 0.001)
    log = io.StringIO()

    with Display(log) as display:
        display.show(HALF)
        eventually(lambda: log.getvalue().count("\n") >= 3)

    assert "\x1b" not in log.getvalue()
    assert "\r" not in log.getvalue()
