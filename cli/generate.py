"""`millstream generate`: sends a prompt through the queue and prints the text that the model generates."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from millstream.cli.generating import generating, prepare, report_usage, show
from millstream.client import Generated


@click.command()
@click.argument("prompt", metavar="[PROMPT|-]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON with the whole result.")
@generating
def generate(prompt: str | None, as_json: bool, **given: Any) -> None:
    """Generate text behind PROMPT, or behind standard input, through the queue.

    Prints the text while it is generated. The model reads the prompt as it is; `millstream chat` uses the model's chat
    template. --json prints text, finish_reason, usage, seed, version, logprobs, tool_calls and timings when the text is
    complete.
    """
    text = _read_prompt(prompt)
    call = prepare(**given)
    with call.client as client:
        if as_json:
            result = client.generate(text, **call.keywords)
            sys.stdout.write(json.dumps(result.json(), separators=(",", ":")) + "\n")
            generated: Generated | None = result
        else:
            stream = client.generate_stream(text, **call.keywords)
            show(stream)
            generated = stream.generated
    if call.verbose:
        report_usage(generated)


def _read_prompt(prompt: str | None) -> str:
    """Returns the prompt. Raises UsageError if there is none."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give one as an argument or on standard input.")
    # Not decoded strictly: the call refuses a text that is not UTF-8.
    return sys.stdin.buffer.read().decode(errors="surrogateescape")
