"""A group of commands that names the command which was probably meant."""

from __future__ import annotations

import click

from millstream.broker.contract.errors import did_you_mean


class Group(click.Group):
    """A group whose error for an unknown command has the closest name. click does the same for options."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and self.get_command(ctx, name) is None:
            close = did_you_mean(name, self.list_commands(ctx))
            if close:
                ctx.fail(f"No such command '{name}'; did you mean {close}?")
        return super().resolve_command(ctx, args)
