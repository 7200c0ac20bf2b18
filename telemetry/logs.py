"""Logs of long-running processes: lines of text, or of JSON, on standard error. No payload and no password is in them.

On a terminal a line of text has its time and its level as well, in the colour of the level unless NO_COLOR is set.

Code logs with the standard library. `set_up` is called once, by the entry point of a process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from millstream.broker.config.telemetry import TelemetrySettings

OURS = "millstream"
"""Parent of all loggers of this product."""

NOISY = ("httpx", "httpcore", "opentelemetry", "sentence_transformers", "torch", "transformers", "urllib3")
"""Loggers of libraries that log each request, or each file of a model."""

_COLORS = {logging.DEBUG: "2", logging.INFO: "32", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}
"""Codes of ECMA-48 by level: dim, green, yellow, red, bold red."""

_PASSWORDS = (
    (re.compile(r"(://[^\s:@/]*):[^\s@/]*@"), r"\1:***@"),
    (re.compile(r"(\w*password=)[^\s&#'\"]*"), r"\1***"),
)


def set_up(settings: TelemetrySettings, who: str = OURS, fields: Mapping[str, str] | None = None) -> None:
    """Makes this process log to standard error.

    `who` is the start of each line of text, on a terminal after time and level. `fields` are in each JSON
    object, without those that are empty. Loggers of other code log warnings and information; only ours log what is for
    debugging.
    """
    handler = logging.StreamHandler(sys.stderr)
    is_json = settings.log_format == "json"
    handler.setFormatter(JsonLines(fields or {}) if is_json else text_lines(who, sys.stderr, os.environ))
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler])
    logging.getLogger(OURS).setLevel(level)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if is_json:
        logging.captureWarnings(True)


class TextLines(logging.Formatter):
    """Formats a record as a line of text after `who`, with the traceback of its exception on further lines."""

    def __init__(self, who: str) -> None:
        super().__init__(f"{who.replace('%', '%%')}: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return without_passwords(super().format(record))


class TerminalLines(TextLines):
    """Formats a record as TextLines does, after its local time and its level, in a colour if `colored`."""

    def __init__(self, who: str, colored: bool) -> None:
        super().__init__(who)
        self._colors = _COLORS if colored else {}

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = f"{record.levelname:<8}"
        if color := self._colors.get(record.levelno):
            level = f"\x1b[{color}m{level}\x1b[0m"
        return f"{at} {level} {super().format(record)}"


def text_lines(who: str, out: TextIO, environ: Mapping[str, str]) -> TextLines:
    """Returns the format of lines of text on `out`: that of a terminal, if it is one.

    It has no colours if the variable NO_COLOR is set to anything (no-color.org), or TERM says that there are none.
    """
    if not out.isatty():
        return TextLines(who)
    return TerminalLines(who, colored=not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb")


class JsonLines(logging.Formatter):
    """Formats a record as a JSON object on one line: ts, level, logger, `fields`, message and exception.

    A record may have a `service` of its own, if its process hosts several.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        own = {"service": service} if (service := getattr(record, "service", "")) else {}
        line: dict[str, str] = {
            "ts": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **{name: value for name, value in self._fields.items() if value},
            **own,
            "message": without_passwords(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = without_passwords(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def without_passwords(text: str) -> str:
    """Returns `text` with *** for each password in a URL."""
    for pattern, replacement in _PASSWORDS:
        text = pattern.sub(replacement, text)
    return text


def stack_of(error: BaseException) -> str:
    """Returns type and stack of an error without its message, which may quote a payload."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{type(error).__name__}\n{frames}" if frames else type(error).__name__
