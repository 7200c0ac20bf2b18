"""Runs a pool: the main thread gives the device to lanes in turn, and a thread loads and evicts models beside it.

No job is claimed for a service before its model is loaded. A model that leaves first stops claiming, then its lane runs
and answers all jobs that it holds, as at a drain; only then its memory is given back.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable, described
from millstream.broker.queue.figure_text import memory
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.look import look
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, is_transient, retrying
from millstream.telemetry.traces import Tracing
from millstream.worker import models
from millstream.worker.host import DeviceShare
from millstream.worker.making import LaneMaker, Place
from millstream.worker.models.base import Closes, Model
from millstream.worker.pool.args import PoolArgs
from millstream.worker.pool.member import Member, Resident
from millstream.worker.pool.standby import Standby
from millstream.worker.scheduling.memory import is_exhaustion
from millstream.worker.scheduling.residence import Memory, next_swap
from millstream.worker.shutdown import Shutdown
from millstream.worker.supervision.child_args import ChildArgs
from millstream.worker.supervision.progress import Progress, State

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Seconds between two looks at the jobs that wait for models that are not in memory."""

DRAINED_LOOK_S = 0.01
"""Seconds between two checks whether a lane that leaves has run its jobs."""


class Pool:
    """The services of one process, with their pages. `work` runs it in the main thread."""

    def __init__(
        self,
        args: PoolArgs,
        child_args: ChildArgs,
        url: str,
        pages: Mapping[str, Progress],
        shutdown: Shutdown,
        tracing: Tracing,
    ) -> None:
        self._args = args
        self._child_args = child_args
        self._url = url
        self._pages = pages
        self._shutdown = shutdown
        self._connection = Connection(url, name=f"millstream-pool-{args.name}")
        self._registry = Registry(self._connection, child_args.prefix)
        self._meter = models.meter_of(child_args.device)
        self._maker = LaneMaker(child_args, self._registry, pages, tracing, meter=self._meter)
        self._share = DeviceShare(len(pages), lambda: shutdown.draining)
        self._keeper = threading.Thread(target=self._keep, name="pool", daemon=True)
        self._members: list[Member] = []
        self._base = 0
        self._loads = False

    def work(self) -> None:
        """Works until the process drains. Raises ThreadFailed, UnknownService, ConfigError."""
        for name in self._pages:
            spec = retrying(lambda name=name: self._registry.read(name), stop=self._shutdown.stopped)  # type: ignore[misc]
            models.loader_of(spec)
            self._members.append(Member(spec))
        # After the libraries are imported, which no eviction undoes.
        self._base = self._meter.used()
        self._standby = Standby(self._child_args, self._connection, self._members, self._shutdown)
        self._standby.start()
        self._keeper.start()
        try:
            self._share.run()
            self._drain()
        finally:
            for member in self._members:
                if member.resident:
                    member.resident.lane.stop()
                    member.resident.lane.await_settled()
            self._standby.stop()

    def _drain(self) -> None:
        for place, member in enumerate(self._members):
            resident = member.resident
            if resident and self._share.remove(place):
                resident.lane.drain()
                member.resident = None
                self._close(member.spec.name, resident)
        # A load may take long, and holds no job. A lane that leaves settles what it held.
        while self._keeper.is_alive() and not self._loads:
            self._keeper.join(DRAINED_LOOK_S)
        self._standby.stop()
        self._standby.join()
        for member in self._members:
            self._standby.leave(member)
            self._pages[member.spec.name].enter(State.DRAINING)
        self._shutdown.check()

    # -- the pool's thread -------------------------------------------------------------------------------------

    def _keep(self) -> None:
        with self._shutdown.guard():
            while not self._shutdown.draining:
                if not self._change():
                    self._shutdown.pause(LOOK_S)

    def _change(self) -> bool:
        """Does the next change of what is in memory. Returns False if none is due."""
        self._look()
        now = time.monotonic()
        standings = [member.standing(now) for member in self._members]
        swap = next_swap(standings, Memory(self._free(), self._args.residence_s), now)
        if swap is None:
            self._show_ready()
            return False
        for place in swap.evict:
            self._evict(place)
        if swap.load is not None and not self._shutdown.draining:
            self._load(swap.load)
        return True

    def _look(self) -> None:
        for member in self._members:
            if member.resident is None:
                try:
                    member.look = look(self._connection.client, self._registry.keys(member.spec.name))
                except Exception as error:
                    if not is_transient(error):
                        raise
                    member.look = None

    def _free(self) -> int | None:
        """Bytes that are free under the limit of the pool; None if it has none."""
        if self._args.memory is None:
            return None
        held = sum(member.held for member in self._members if member.resident)
        return self._args.memory - max(self._meter.used(), self._base + held)

    def _show_ready(self) -> None:
        """Says on the pages that nothing more is to be loaded now. A model whose load failed is not ready."""
        for member in self._members:
            page = self._pages[member.spec.name]
            if member.state != "failed" and page.state is State.STARTING:
                page.enter(State.READY)

    def _evict(self, place: int) -> None:
        """Ends the lane at `place` when it has answered all that it holds, and frees the memory of its model."""
        member = self._members[place]
        resident, name = member.resident, member.spec.name
        if resident is None:
            return
        member.state = "evicting"
        resident.shutdown.drain()
        resident.lane.announce()
        Lease(self._connection.client, self._registry.keys(name)).ring()
        while not resident.lane.runner.drained:
            if self._shutdown.draining:
                return
            self._shutdown.pause(DRAINED_LOOK_S)
        if not self._share.remove(place):
            return
        # Until the turn in which the lane was still asked for work has ended.
        with self._share.device():
            pass
        resident.lane.drain()
        member.note_left(resident.lane.job_s)
        self._standby.beat_soon()
        self._close(name, resident)
        del resident
        self._meter.free()
        log.info("%s left the memory of pool %s: %s are in use", name, self._args.name, memory(self._meter.used()))

    def _close(self, name: str, resident: Resident) -> None:
        if isinstance(resident.model, Closes):
            resident.model.close()
        self._maker.forget(name)
        self._shutdown.forget(resident.shutdown)
        resident.connection.close()

    def _load(self, place: int) -> None:
        member, free = self._members[place], self._free()
        name, began = member.spec.name, time.monotonic()
        member.state, self._loads = "loading", True
        self._standby.beat_soon()
        try:
            resident = self._make(member)
        except Exception as error:  # noqa: BLE001 - a model that cannot be loaded must not end the others
            if not self._shutdown.draining:
                self._note_failed(member, error, free)
            return
        finally:
            self._loads = False
        now = time.monotonic()
        member.resident = resident
        member.note_loaded(now - began, now)
        self._pages[name].set_reason("")
        resident.lane.start()
        if not self._share.put(place, resident.lane):
            resident.lane.drain()
            member.resident = None
            self._close(name, resident)
            return
        used = memory(self._meter.used())
        log.info("%s is in memory of pool %s after %.1f s: %s are in use", name, self._args.name, now - began, used)

    def _make(self, member: Member) -> Resident:
        """Loads and measures a model, and makes its lane. Raises anything if that fails."""
        name = member.spec.name
        with ExitStack() as undo:
            with self._beside_forwards(member.spec):
                member.spec, model = self._maker.load(name, self._shutdown)
            shutdown, connection = Shutdown(self._shutdown), Connection(self._url, name=f"millstream-worker-{name}")
            place = Place(shutdown, connection, self._share.device, member.figures, member.loads)
            undo.callback(self._undo, name, model, place)
            lane = self._maker.lane(member.spec, model, place)
            size = self._maker.sizes[name]
            member.held, member.loading = size.held, size.loading
            self._check_fits(member)
            undo.pop_all()
            return Resident(model, lane, shutdown, connection)

    def _undo(self, name: str, model: Model, place: Place) -> None:
        if isinstance(model, Closes):
            model.close()
        self._maker.forget(name)
        self._shutdown.forget(place.shutdown)
        place.connection.close()

    def _beside_forwards(self, spec: ServiceSpec) -> AbstractContextManager[None]:
        if "torch" not in sys.modules or not spec.model.operation.needs_weights:
            return nullcontext()
        from millstream.worker.models.loading.beside import beside_forwards

        return beside_forwards(self._share.device)

    def _check_fits(self, member: Member) -> None:
        """Raises ModelUnavailable if the model exceeds the memory of the pool though no other model is there."""
        limit = self._args.memory
        if limit is None or any(each.resident for each in self._members) or self._meter.used() <= limit:
            return
        raise ModelUnavailable(
            f"its model takes {memory(member.held)} beside {memory(self._base)} of the process, and pool "
            f"{self._args.name!r} has {memory(limit)}",
            hint="raise `memory` of the pool, or lower batch_size or max_batch_tokens",
        )

    def _note_failed(self, member: Member, error: Exception, free: int | None) -> None:
        name, why = member.spec.name, described(error)
        if is_exhaustion(error) and free is not None:
            # It is tried again with more room.
            member.loading = max(member.loading, free + 1)
        error.__traceback__ = None
        member.note_failed(why, time.monotonic())
        page = self._pages[name]
        page.enter(State.STARTING)
        page.set_reason(why)
        self._standby.leave(member)
        self._meter.free()
        log.error("service %s: its model cannot be loaded, tried again later: %s", name, why)
