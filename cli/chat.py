"""`millstream chat`: a conversation with a language model through the queue."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import Any

import click

from millstream.broker.contract.errors import MillstreamError
from millstream.cli.generating import Call, generating, prepare, report_usage, show
from millstream.cli.main import report

_PROMPT = "> "


@click.command()
@click.option("--system", metavar="TEXT", help="Instructions for the model, before the conversation.")
@generating
def chat(system: str | None, **given: Any) -> None:
    """Talk to a language model: each line of input is a message, and the answer is printed while it is generated.

    The model reads the whole conversation. The line /reset begins a new one. Ctrl-C stops an answer, Ctrl-D ends.
    If standard input is not a terminal, its lines are the messages, and the first error ends the command.
    """
    call = prepare(**given)
    with call.client:
        conversation = Conversation(call, system)
        if sys.stdin.isatty():
            _talk(conversation)
        else:
            for line in sys.stdin.buffer:
                conversation.take(line.decode(errors="surrogateescape"))


class Conversation:
    """Messages so far, and the way to the model that answers them."""

    def __init__(self, call: Call, system: str | None) -> None:
        self._call = call
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._system)

    def take(self, line: str) -> None:
        """Answers a message, or obeys /reset. An empty line does nothing.

        A message whose answer failed, or was interrupted before its first word, is no part of the conversation. Raises
        the errors of Client.chat, and KeyboardInterrupt.
        """
        text = line.rstrip("\r\n")
        if text.strip() == "/reset":
            self._messages = list(self._system)
        elif text.strip():
            self._answer([*self._messages, {"role": "user", "content": text}])

    def _answer(self, messages: list[dict[str, str]]) -> None:
        stream = self._call.client.chat_stream(messages, **self._call.keywords)
        try:
            show(stream)
        except KeyboardInterrupt:
            if stream.text:
                self._messages = [*messages, {"role": "assistant", "content": stream.text}]
            raise
        self._messages = [*messages, {"role": "assistant", "content": stream.text}]
        if self._call.verbose:
            report_usage(stream.generated)


def _talk(conversation: Conversation) -> None:
    """Reads messages from the terminal until Ctrl-D."""
    with suppress(ImportError):
        # Gives `input` line editing and a history.
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        # The call refuses a line that is not UTF-8, and the conversation goes on.
        sys.stdin.reconfigure(errors="surrogateescape")
    click.echo("Ctrl-C stops an answer, Ctrl-D ends, /reset begins a new conversation.", err=True)
    while True:
        try:
            conversation.take(_read_line())
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo(err=True)
        except MillstreamError as error:
            report(error)


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    # `input` would print the prompt into the file or the pipe.
    click.echo(_PROMPT, nl=False, err=True)
    return input()
