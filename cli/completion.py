"""`millstream completion`: prints the script with which a shell completes commands, options and services."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

_VARIABLE = "_MILLSTREAM_COMPLETE"
"""Environment variable by which the script asks the command for completions; click derives it from the name."""

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options, and the services of ./config.yaml in SHELL.

    \b
    bash  eval "$(millstream completion bash)"            in ~/.bashrc
    zsh   eval "$(millstream completion zsh)"             in ~/.zshrc, after compinit
    fish  millstream completion fish > ~/.config/fish/completions/millstream.fish
    """
    kind = get_completion_class(shell)
    assert kind, f"click has no completion for {shell}"
    click.echo(kind(ctx.find_root().command, {}, "millstream", _VARIABLE).source().strip())


def complete_services(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns the services of ./config.yaml whose names begin with `incomplete`. No file, or a wrong one: none."""
    # Imported here: options.py is imported by commands that need no configuration. No server is asked: it may be away.
    from millstream.broker.config import yaml
    from millstream.broker.config.load import DEFAULT_PATH
    from millstream.broker.contract.errors import MillstreamError

    try:
        services = yaml.read(DEFAULT_PATH).tree.get("services")
    except MillstreamError:
        return []
    names = [str(name) for name in services] if isinstance(services, dict) else []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
