"""Packages of numbers that a lane counted and that the metrics of its service do not have yet. Pure.

A package whose heartbeat failed may have been added all the same, so it is sent again unchanged, and the server adds
its number once. What is counted meanwhile goes into the next package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from millstream.broker.queue.lease import LEASE_S, NO_PACKAGE, Package

REPEATED_S = 3 * LEASE_S
"""Seconds for which a package is sent again; then it counts as added. The server knows its number for 4 leases, and
might add it twice after that."""

MOST_PACKAGES = 2**32
"""Packages of one lane at most."""


class Packages:
    """The packages of one lane. `read` returns all counts since the lane started; they never fall.

    `number` counts the lanes of the service in this process, from 0: the packages of a later one have higher numbers.
    """

    def __init__(self, read: Callable[[], Mapping[str, int]], number: int = 0) -> None:
        self._read = read
        self._added: Mapping[str, int] = {}
        self._counted: Mapping[str, int] = {}
        self._open = NO_PACKAGE
        self._began = 0.0
        self._number = number * MOST_PACKAGES

    def next(self, now: float) -> Package:
        """Returns the package to send at `now`, monotonic seconds: the unconfirmed one, or a new one."""
        if self._open is not NO_PACKAGE and now - self._began > REPEATED_S:
            self.confirm(self._open)
        if self._open is NO_PACKAGE:
            self._pack(now)
        return self._open

    def confirm(self, package: Package) -> None:
        """Notes that the server has added `package`."""
        if package is self._open and package is not NO_PACKAGE:
            self._added, self._open = self._counted, NO_PACKAGE

    def _pack(self, now: float) -> None:
        counted = dict(self._read())
        new = {field: count - self._added.get(field, 0) for field, count in counted.items()}
        if new := {field: count for field, count in new.items() if count > 0}:
            self._number += 1
            self._counted, self._began, self._open = counted, now, Package(self._number, new)
