"""A supervisor that grants no time to drain: hasty.py SERVICE --count N, as `millstream worker run`.

Told to stop, it kills its workers amid their forwards. `worker run` does so only after DRAIN_S.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing

import click

from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.keys import DEFAULT_PREFIX
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.cli.interrupts import Interrupts
from millstream.cli.status import Lines
from millstream.cli.supervise import supervise
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

# -P: the folder of this file has modules whose names others use.
PROGRAM = (sys.executable, "-P", __file__)


@click.command(help=__doc__)
@click.argument("service")
@click.option("--count", type=int, default=1)
def main(service: str, count: int) -> None:
    url = os.environ[URL_VARIABLE]
    with Interrupts() as interrupts:
        with closing(Connection(url)) as connection:
            spec = Registry(connection).read(service)
        supervise(Supervisor(url, DEFAULT_PREFIX, [Plan(spec, count)], drain_s=0.0), interrupts, Lines())


if __name__ == "__main__":
    try:
        main()
    except MillstreamError as error:
        sys.exit(str(error))
