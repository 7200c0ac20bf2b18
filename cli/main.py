"""The `millstream` command: imports subcommands by name, and turns every error into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from millstream.broker.config.variables import DEBUG_VARIABLE
from millstream.broker.contract.errors import MillstreamError
from millstream.cli.groups import Group
from millstream.cli.standard import open_closed_streams, unwritable

INTERNAL_ERROR = 70
INTERRUPTED = 130
TERMINATED = 143


class Lazy(NamedTuple):
    """A command that is imported when it is called: its "module:attribute", and its line in the help."""

    target: str
    help: str


COMMANDS = {
    "acl": Lazy("millstream.cli.acl:acl", "Print the ACL of a Redis user with the rights that a role needs."),
    "bench": Lazy("millstream.cli.bench:bench", "Measure a running service with real calls."),
    "bulk": Lazy("millstream.cli.bulk:bulk", "Send files of any size through the queue, with runs that go on."),
    "chat": Lazy("millstream.cli.chat:chat", "Talk to a language model through the queue."),
    "completion": Lazy("millstream.cli.completion:completion", "Print the script that completes commands in a shell."),
    "config": Lazy(
        "millstream.cli.config:config", "Check or show a configuration, or publish it for workers and clients."
    ),
    "dashboard": Lazy("millstream.cli.dashboard:dashboard", "Serve a web page on the queues and their workers."),
    "dead": Lazy("millstream.cli.dead:dead", "List a service's dead letters, run them again or remove them."),
    "doctor": Lazy("millstream.cli.doctor:doctor", "Say why nothing moves, and which command mends it."),
    "embed": Lazy("millstream.cli.embed:embed", "Embed texts through the queue."),
    "exporter": Lazy("millstream.cli.exporter:exporter", "Serve the metrics of all services to Prometheus."),
    "generate": Lazy("millstream.cli.generate:generate", "Generate text through the queue."),
    "job": Lazy("millstream.cli.job:job", "Look at single jobs, wait for their results, or cancel them."),
    "key": Lazy("millstream.cli.key:key", "Make, list and revoke the API keys of `millstream serve`."),
    "queue": Lazy("millstream.cli.queue:queue", "Show, pause, drain or empty the queues."),
    "route": Lazy(
        "millstream.cli.route:route",
        "Show the routes between versions of a service, and change their weights while calls go on.",
    ),
    "serve": Lazy("millstream.cli.serve:serve", "Serve the API of OpenAI, Cohere, Jina and TEI in front of the queue."),
    "top": Lazy("millstream.cli.top:top", "Show services, workers and latencies, and keep them up to date."),
    "tune": Lazy("millstream.cli.tune:tune", "Measure with which batch limits a service is fastest on this machine."),
    "up": Lazy("millstream.cli.up:up", "Start a server if none is configured, and workers for each service."),
    "worker": Lazy(
        "millstream.cli.worker:worker", "Run workers for the services of a server, list the live ones, or empty a host."
    ),
}


class LazyGroup(Group):
    """A group that imports a command when it is called, and prints an error as one line on stderr."""

    commands_by_name: Mapping[str, Lazy] = COMMANDS

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands_by_name)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands_by_name:
            module, _, attribute = self.commands_by_name[cmd_name].target.partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes commands by their lines of the help, since click's own way would import all of them."""
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=self.commands_by_name[name].help) for name in names]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands_by_name[name].help) for name in self.list_commands(ctx)])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        open_closed_streams()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()  # raises here if the reader has gone, not at the interpreter's exit
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own: usage errors exit 2, a closed pipe ends quietly
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except MillstreamError as error:
            report(error)
            ctx.exit(error.exit_code)
        except Exception as error:  # noqa: BLE001 - a user gets one line, not a traceback
            known = unwritable(error)
            report(known or error)
            ctx.exit(known.exit_code if known else INTERNAL_ERROR)


def report(error: Exception) -> None:
    """Prints `error` to stderr, one line per error if it has several. MILLSTREAM_DEBUG=1 adds the traceback."""
    if os.environ.get(DEBUG_VARIABLE):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, MillstreamError):
        lines = str(error).splitlines()
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        lines = [f"internal error: {text}; run with {DEBUG_VARIABLE}=1 for the traceback"]
    with suppress(OSError):  # if stderr is closed, the exit status still tells of the error
        for line in lines:
            click.echo(f"millstream: {line}", err=True)


def exit_codes() -> dict[int, list[str]]:
    """Returns each exit code with the error codes, or the outcomes, that it stands for."""
    codes: dict[int, list[str]] = defaultdict(list)
    codes[0].append("done")
    for cls in _error_classes(MillstreamError):
        codes[cls.exit_code].append(cls.code)
    codes[2].append("wrong usage")
    codes[INTERNAL_ERROR].append("internal error")
    codes[INTERRUPTED].append("interrupted")
    codes[TERMINATED].append("terminated")
    return dict(sorted(codes.items()))


def _error_classes(cls: type[MillstreamError]) -> Iterator[type[MillstreamError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _error_classes(child)


_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {', '.join(names)}" for code, names in exit_codes().items())


@click.group(cls=LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="millstream", prog_name="millstream", message="%(prog)s %(version)s")
def main() -> None:
    """A durable, model-aware job queue for local inference."""


if __name__ == "__main__":
    main(prog_name="millstream")
