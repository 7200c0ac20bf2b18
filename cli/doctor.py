"""`millstream doctor`: says why nothing moves and what will break soon, with the command that mends it."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

import click

from millstream.broker.queue.diagnosis import Finding
from millstream.broker.queue.examination import examine
from millstream.cli import options
from millstream.cli.server import connect, find_server
from millstream.cli.table import escape, quantity

TROUBLE = 1
"""Exit code if there is an error or a warning."""

_INDENT = "    "


@click.command(epilog="Exit codes: 0 no trouble, 1 an error or a warning, and those of every command.")
@options.services
@options.url
@options.prefix
@options.json_output(", with a stable name of each cause")
@click.option("--drift", is_flag=True, help="Also embed fixed texts, and compare their vectors with those of before.")
@click.option("--accept", is_flag=True, help="With --drift: keep the vectors of now instead of those of before.")
@click.pass_context
def doctor(
    ctx: click.Context,
    services: tuple[str, ...],
    url: str | None,
    prefix: str | None,
    as_json: bool,
    drift: bool,
    accept: bool,
) -> None:
    """Look at the server and at SERVICE, or at all services, and say what is wrong with them.

    An error keeps jobs from moving, or loses them; a warning will, or hurts a part. Nothing is changed, unless --drift
    keeps vectors: the first ones of each embedding service. It costs each of them a forward.
    """
    if accept and not drift:
        raise click.UsageError("--accept is for --drift.")
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        # Raises UnknownService with the name that was probably meant.
        examination = examine(connection, target.prefix, services)
    findings = list(examination.findings)
    if drift:
        # Imported here: it loads a client, and `doctor` alone needs none.
        from millstream.cli.drift import check_drift

        findings += check_drift(target.url, target.prefix, list(examination.specs.values()), accept=accept)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    else:
        click.echo(_text(findings, len(examination.views)))
    if any(finding.severity != "note" for finding in findings):
        ctx.exit(TROUBLE)


def _text(findings: Sequence[Finding], services: int) -> str:
    lines = [line for finding in findings for line in _lines(finding)]
    if all(finding.severity == "note" for finding in findings):
        lines.append(f"no trouble found with the server and {quantity(services, 'service')}")
    return "\n".join(lines)


def _lines(finding: Finding) -> Sequence[str]:
    place = f"service {finding.service}" if finding.service else "server"
    text = escape(f"{finding.severity}: {place}: {finding.what}")
    if not sys.stdout.isatty():
        return [f"{text}; {escape(finding.fix)}"]
    width = max(40, shutil.get_terminal_size().columns - 1)
    # Words are not broken: a command can be copied.
    wrapped = textwrap.wrap(text, width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False)
    return [
        *wrapped,
        *textwrap.wrap(
            f"-> {escape(finding.fix)}",
            width,
            initial_indent=_INDENT,
            subsequent_indent=_INDENT + "   ",
            break_long_words=False,
            break_on_hyphens=False,
        ),
    ]
