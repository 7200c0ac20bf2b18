"""Options of `millstream generate` and `millstream chat`, and the output of a text while it is generated."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.operations import GENERATE
from millstream.cli import options
from millstream.cli.calling import DEFAULT_WAIT_S, find_service
from millstream.cli.completion import complete_services
from millstream.cli.options import SecondsRange
from millstream.cli.server import find_server
from millstream.client import Client, Generated, GenerateStream

Command = TypeVar("Command", bound=Callable[..., Any])

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal may obey: a generated text must not move its cursor or change its title."""

_OPTIONS = (
    click.option(
        "--service",
        metavar="NAME",
        shell_complete=complete_services,
        help="By default the only registered llm service.",
    ),
    click.option("--max-tokens", type=click.IntRange(min=1), metavar="NUMBER", help="Most tokens to generate."),
    click.option("--temperature", type=float, help="0 always takes the most probable token."),
    click.option("--top-p", type=float, help="Take tokens that have this probability together."),
    click.option("--top-k", type=click.IntRange(min=0), metavar="NUMBER", help="Take one of this many tokens."),
    click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same text again."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the text before TEXT; may be given several times."),
    click.option(
        "--json-schema",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Generate JSON that follows the schema in FILE.",
    ),
    click.option("--priority", type=click.Choice(["realtime", "normal", "batch"]), default="normal", show_default=True),
    click.option("--timeout", type=SecondsRange(min=0, min_open=True), help="Seconds for a whole text."),
    click.option(
        "--wait",
        "wait_s",
        type=SecondsRange(min=0),
        default=DEFAULT_WAIT_S,
        show_default=True,
        help="Seconds to wait for a worker if none is alive.",
    ),
    click.option("--verbose", "-v", is_flag=True, help="Print finish reason, tokens and time to standard error."),
    options.url,
    options.prefix,
)


def generating(command: Command) -> Command:
    """Adds the options that `prepare` reads."""
    return reduce(lambda inner, option: option(inner), reversed(_OPTIONS), command)


class Call(NamedTuple):
    """Client of a command, and the keywords of its calls."""

    client: Client
    keywords: Mapping[str, Any]
    verbose: bool


def prepare(
    service: str | None,
    wait_s: float,
    json_schema: Path | None,
    stop: tuple[str, ...],
    verbose: bool,
    url: str | None,
    prefix: str | None,
    **keywords: Any,
) -> Call:
    """Returns a client of the server, and the keywords that the options of `generating` give.

    Raises NoWorkers, UnknownService, InvalidRequest, ConfigError, BrokerUnavailable.
    """
    response_format = None if json_schema is None else {"type": "json_schema", "schema": _read_schema(json_schema)}
    target = find_server(url, prefix)
    name = find_service(
        target.url, target.prefix, service, GENERATE, lambda operation: operation.streams, wait_s=wait_s
    )
    given = {**keywords, "service": name, "stop": stop or None, "response_format": response_format}
    return Call(Client(target.url, prefix=target.prefix), given, verbose)


def _read_schema(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{file} is not JSON: {error}") from None
    except OSError as error:
        raise click.FileError(str(file), error.strerror) from None


def show(stream: GenerateStream) -> None:
    """Prints a text while it is generated, and ends its last line. Closes the stream, also if it is interrupted."""
    with stream:
        try:
            for delta in stream:
                write(delta.text)
        finally:
            if stream.text and not stream.text.endswith("\n"):
                write("\n")


def write(text: str) -> None:
    """Prints a piece of a text at once. On a terminal, control characters are printed as escapes."""
    # Not click.echo, which drops some characters if the output is no terminal.
    sys.stdout.write(_CONTROLS.sub(_escape, text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _escape(control: re.Match[str]) -> str:
    return control[0].encode("unicode_escape").decode()


def report_usage(generated: Generated | None) -> None:
    """Prints finish reason, tokens and time to standard error."""
    if generated is None:
        return
    usage, seconds = generated.usage, generated.timings.get("total", 0.0) / 1000
    tokens = [f"{count} {name.replace('_', ' ')}" for name, count in usage.items()]
    seed = [] if generated.seed is None else [f"seed {generated.seed}"]
    click.echo(f"millstream: {', '.join([generated.finish_reason, *tokens, *seed, f'{seconds:.2f} s'])}", err=True)
