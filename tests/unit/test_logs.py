"""Log lines: text or JSON, with the service and the worker, without passwords and without payloads."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from millstream.broker.config.load import telemetry_of
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.broker.contract.errors import ConfigError
from millstream.telemetry.logs import JsonLines, TextLines, stack_of, text_lines, without_passwords


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("millstream.worker.lane", logging.WARNING, "lane.py", 1, message, args, exc_info)


def raised(message: str) -> ValueError:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


def test_a_json_line_names_time_level_logger_service_and_worker() -> None:
    line = json.loads(JsonLines({"service": "embed", "worker": "w-1", "host": ""}).format(record("%d rows", 3)))

    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "millstream.worker.lane",
        "service": "embed",
        "worker": "w-1",
        "message": "3 rows",
    }


def test_a_json_line_is_one_line_with_the_exception_in_it() -> None:
    text = JsonLines({}).format(record("failed", error=raised("two\nlines")))

    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("ValueError: two\nlines")


def test_a_record_of_one_of_several_services_names_that_one() -> None:
    each = record("batch")
    each.service = "chat"

    assert json.loads(JsonLines({"service": "embed+chat"}).format(each))["service"] == "chat"


def test_a_line_of_text_begins_with_the_process() -> None:
    assert TextLines("worker 100%").format(record("ready: %s", "m")) == "worker 100%: ready: m"


class Output(io.StringIO):
    """Standard error: a terminal or a file."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "environ", "line"),
    [
        (True, {"TERM": "xterm"}, "{at} \x1b[33mWARNING \x1b[0m worker 1: ready"),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, "{at} \x1b[33mWARNING \x1b[0m worker 1: ready"),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, "{at} WARNING  worker 1: ready"),
        (True, {"TERM": "dumb"}, "{at} WARNING  worker 1: ready"),
        (True, {}, "{at} WARNING  worker 1: ready"),
        (False, {"TERM": "xterm"}, "worker 1: ready"),
    ],
)
def test_only_a_terminal_shows_time_and_level_and_colours_only_if_they_are_wanted(
    is_terminal: bool, environ: Mapping[str, str], line: str
) -> None:
    each = record("ready")
    at = time.strftime("%H:%M:%S", time.localtime(each.created))

    assert text_lines("worker 1", Output(is_terminal), environ).format(each) == line.format(at=at)


def test_a_process_on_a_terminal_logs_in_colours_and_one_with_a_pipe_does_not() -> None:
    program = """
import logging
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.telemetry import logs
logs.set_up(TelemetrySettings())
logging.getLogger("millstream.worker").error("redis://:s3cr3t@host is away")
"""
    environ = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    ours, its = os.openpty()
    subprocess.run([sys.executable, "-c", program], stderr=its, env=environ, timeout=60, check=True)
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environ, timeout=60, check=True)
    os.close(its)
    shown = os.read(ours, 4096).decode()
    os.close(ours)

    message = "millstream: redis://:***@host is away"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d \x1b\[31mERROR   \x1b\[0m {re.escape(message)}\r\n", shown)
    assert piped.stderr.decode() == f"{message}\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:s3cr3t@host:6379/0 is away", "redis://:***@host:6379/0 is away"),
        ("rediss://me:s3cr3t@host and redis://host", "rediss://me:***@host and redis://host"),
        ("redis://host?password=s3cr3t&db=1", "redis://host?password=***&db=1"),
        ("redis://host?ssl_password=s3cr3t", "redis://host?ssl_password=***"),
        ("http://host:8000/v1 at 10:30, a@b", "http://host:8000/v1 at 10:30, a@b"),
    ],
)
def test_passwords_of_urls_are_masked(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
    assert TextLines("x").format(record(text)) == f"x: {shown}"
    assert json.loads(JsonLines({}).format(record(text)))["message"] == shown
    assert "s3cr3t" not in JsonLines({}).format(record("failed", error=raised(text)))


def test_a_stack_has_no_message_since_it_may_quote_a_payload() -> None:
    stack = stack_of(raised("a payload"))

    assert stack.startswith("ValueError\n")
    assert "in raised" in stack
    assert "a payload" not in stack


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, TelemetrySettings()),
        ({"MILLSTREAM_TELEMETRY__LOG_FORMAT": "json"}, TelemetrySettings(log_format="json")),
        ({"MILLSTREAM_TELEMETRY__TRACES": "off"}, TelemetrySettings(traces="off")),
        ({"MILLSTREAM_DEBUG": "1"}, TelemetrySettings(log_level="debug")),
        ({"MILLSTREAM_DEBUG": "1", "MILLSTREAM_TELEMETRY__LOG_LEVEL": "error"}, TelemetrySettings(log_level="error")),
        ({"MILLSTREAM_SERVICES__NONE__RUNTIME__BATCH_SIZE": "1"}, TelemetrySettings()),
    ],
)
def test_a_process_without_a_file_reads_variables(environ: Mapping[str, str], settings: TelemetrySettings) -> None:
    assert telemetry_of(environ).under(environ) == settings


def test_a_child_gets_the_settings_of_its_supervisor_by_its_environment() -> None:
    settings = TelemetrySettings(log_format="json", log_level="debug", traces="on", otlp_endpoint="http://:p@host:4318")

    variables = settings.variables()

    assert telemetry_of(variables) == settings.model_copy(update={"otlp_endpoint": None})
    assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://:p@host:4318"


def test_a_wrong_variable_is_named_with_its_fix() -> None:
    with pytest.raises(ConfigError, match=r"MILLSTREAM_TELEMETRY__LOG_LEVEL: telemetry\.log_level: must be .* did you"):
        telemetry_of({"MILLSTREAM_TELEMETRY__LOG_LEVEL": "warn"})
    with pytest.raises(ConfigError, match="must be the URL of a collector") as caught:
        telemetry_of({"MILLSTREAM_TELEMETRY__OTLP_ENDPOINT": "ftp://:s3cr3t@host"})
    assert "s3cr3t" not in str(caught.value)


def test_only_our_loggers_log_what_is_for_debugging() -> None:
    program = """
import logging, warnings
from millstream.broker.config.telemetry import TelemetrySettings
from millstream.telemetry import logs
logs.set_up(TelemetrySettings(log_format="json", log_level="debug"))
for name in ("millstream.worker", "users", "httpx"):
    logging.getLogger(name).debug("debug")
    logging.getLogger(name).info("info")
warnings.warn("old")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]

    shown = [(each["logger"], each["level"]) for each in lines]
    assert shown == [
        ("millstream.worker", "debug"),
        ("millstream.worker", "info"),
        ("users", "info"),
        ("py.warnings", "warning"),
    ]
