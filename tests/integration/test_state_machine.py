"""The queue's verbs in any order, by several workers and callers, beside a model that says what must be true.

The suite makes a short run. The long one prints how often each rule fired and each thing happened, and fails where one
of them did not happen 500 times:

    MILLSTREAM_LONG=1 .venv/bin/pytest tests/integration/test_state_machine.py -s

A failure of the short run is kept, and the long one, which starts with it, makes it small; that takes minutes.
"""

from __future__ import annotations

import pytest
from queue_machine import COUNTED, QueueMachine, run_short_or_long

from millstream.broker.transport.connection import Connection

EXAMPLES, LONG_EXAMPLES = 80, 4_000


@pytest.mark.timeout(1_800)
def test_in_any_order_of_the_verbs_nothing_is_lost_doubled_or_out_of_turn(connection: Connection) -> None:
    run_short_or_long(connection, EXAMPLES, LONG_EXAMPLES, COUNTED, QueueMachine)
