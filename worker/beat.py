"""Thread: once a second says that this process lives, extends its lease, and hears what it lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from millstream.broker.connection import is_transient
from millstream.broker.lease import Beat, Lease
from millstream.worker.shared import Shared

log = logging.getLogger(__name__)

EVERY_S = 1.0


class Heart(threading.Thread):
    """Beats until `stop`. `status` is asked at each beat; `heard` gets the server's answer."""

    def __init__(
        self,
        shared: Shared,
        lease: Lease,
        status: Callable[[], Mapping[str, str | int]],
        heard: Callable[[Beat], None],
        stuck: Callable[[], bool],
    ) -> None:
        super().__init__(name="beat", daemon=True)
        self._consumer = shared.consumer
        self._lease = lease
        self._status = status
        self._held = shared.window.names
        self._heard = heard
        self._stuck = stuck
        self._life = shared.life
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        with self._life.guard():
            while not self._stopped.wait(EVERY_S):
                self.beat()

    def beat(self) -> None:
        """One beat, and a reclaim pass where one is due. A server that is away is tried again at the next beat.

        A process whose runner is stuck stops beating: its jobs are not its own for longer than its lease.
        """
        if self._stuck():
            return
        try:
            beat = self._lease.beat(self._consumer, self._status(), self._held())
            self._heard(beat)
            if beat.reclaim_due and (returned := self._lease.reclaim()):
                log.warning("%d jobs of lost workers were given back to the queue", returned)
        except Exception as error:
            # NOGROUP: the claimer makes the group again.
            if not is_transient(error) and "NOGROUP" not in str(error):
                raise
            log.debug("beat: %s", error)
