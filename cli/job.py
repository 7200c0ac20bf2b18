"""`millstream job`: looks at single jobs, waits for them and cancels them."""

from __future__ import annotations

import click

from millstream.cli.groups import Group
from millstream.cli.job_show import show
from millstream.cli.job_trace import trace
from millstream.cli.job_wait import cancel, wait


@click.group(cls=Group)
def job() -> None:
    """Look at single jobs, wait for their results, or cancel them."""


for command in (show, trace, wait, cancel):
    job.add_command(command)
