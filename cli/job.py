"""`millstream job`: looks at single jobs."""

from __future__ import annotations

import click

from millstream.cli.job_trace import trace


@click.group()
def job() -> None:
    """Look at single jobs."""


job.add_command(trace)
