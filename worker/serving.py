"""Any function as a service, run by the program that holds it: `serve` is a worker without a supervisor."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

from millstream.broker.config import given_service
from millstream.broker.connection import Connection
from millstream.broker.connection import check as check_server
from millstream.broker.errors import ConfigError, InvalidRequest, MillstreamError, UnknownService, described
from millstream.broker.registry import Registry
from millstream.broker.spec import ServiceSpec
from millstream.broker.target import find_target
from millstream.worker.models.custom import CustomModel, Hooks, name_of
from millstream.worker.orders import Orders, new_consumer
from millstream.worker.process import Worker
from millstream.worker.progress import Progress

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often it is looked at whether the function is stuck."""


class _Ended(BaseException):
    """A signal came before anything was claimed."""


def serve(
    process_fn: Callable[..., object],
    service: str,
    *,
    url: str | None = None,
    prefix: str | None = None,
    device: str | None = None,
    replace: bool = False,
    cost: Callable[[Any], int] | None = None,
    check: Callable[[Any], object] | None = None,
    set_up: Callable[[str | None], object] | None = None,
    tear_down: Callable[[], object] | None = None,
    **limits: Any,
) -> None:
    """Answer `service` with `process_fn(payloads) -> results`, in this process, until SIGTERM or Ctrl-C; then drain.

    `process_fn` is a function, an object that can be called, or a class of such objects; it gets a list of payloads,
    any JSON, and gives one result for each, in order: a list of JSON values, or an array, float32 [payloads, dim].
    `cost(payload)`, `check(payload)`, `set_up(device)` and `tear_down()`, or methods of these names: see Hooks.

    Which server: as `Client` finds it. A service that is not registered is registered, with `limits`, which are those
    of `runtime` in config.yaml: batch_size, batch_timeout, max_queue_size, total_timeout, stall_timeout and so on. Of
    one that is, they stay what they are; other `limits` need `replace`, as does another function.

    Nobody watches this process. Where it fails or exceeds stall_timeout (it then ends, with status 1), it gives back
    what it held itself; where it is killed, other workers of the service, or its next one, do so a lease later, 5 s.

    Raises ConfigError for limits that are wrong or not those registered, ModelUnavailable where the function cannot be
    set up, InvalidRequest outside of the main thread, BrokerUnavailable.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InvalidRequest("serve runs in the main thread of its process: it takes the signals that end it")
    target = find_target(url, prefix, os.environ)
    _register(Connection(target.url, name="millstream-worker"), target.prefix, service, limits, replace)
    hooks = Hooks(cost, check, set_up, tear_down)

    def load(spec: ServiceSpec) -> CustomModel:
        return CustomModel(process_fn, name_of(process_fn), spec.runtime, device, hooks)

    progress = Progress.create()
    worker = Worker(Orders(service, target.prefix, new_consumer(), device, 1, progress.fd), target.url, load)
    with ExitStack() as ends:
        ends.callback(progress.close)
        ends.callback(worker.close)
        ends.enter_context(suppress(_Ended))
        ends.enter_context(_giving_back(worker))
        ends.enter_context(_watched(worker))
        ends.enter_context(_drained_by_signals(worker))
        worker.work()


def _register(connection: Connection, prefix: str, service: str, limits: Mapping[str, object], replace: bool) -> None:
    """See that the service is there, with these limits if any are given. Raises ConfigError, BrokerUnavailable."""
    registry = Registry(connection, prefix)
    try:
        check_server(connection)
        try:
            registered = registry.read(service)
        except UnknownService:
            registered = None
        if registered and registered.model.type != "custom":
            raise ConfigError(
                f"service {service!r} is registered with type {registered.model.type!r}", hint="choose another name"
            )
        if registered is None or limits or replace:
            registry.push([_wanted(service, registered, limits)], replace=replace)
    finally:
        connection.close()


def _wanted(service: str, registered: ServiceSpec | None, limits: Mapping[str, object]) -> ServiceSpec:
    """The service with `limits`, and all else as it is registered. Raises ConfigError."""
    if registered is None:
        return given_service(service, limits)
    if not limits:
        return registered
    runtime = given_service(service, {"worker_count": registered.runtime.worker_count, **limits}).runtime
    return registered.model_copy(update={"runtime": runtime})


@contextmanager
def _drained_by_signals(worker: Worker) -> Iterator[None]:
    """The first signal drains; the next one does what it did before."""

    def drain(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        if worker.starting:
            raise _Ended
        worker.drain()

    before = {number: signal.signal(number, drain) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _giving_back(worker: Worker) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not worker.starting:
            _give_back(worker, f"failed: {described(error)}")
        raise


@contextmanager
def _watched(worker: Worker) -> Iterator[None]:
    """Meanwhile a thread ends this process where the function is stuck: nobody else would."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_S):
            if worker.stuck:
                log.error("no progress for longer than stall_timeout: this process ends")
                _give_back(worker, "made no progress for longer than stall_timeout")
                logging.shutdown()
                os._exit(1)

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _give_back(worker: Worker, how: str) -> None:
    try:
        worker.give_back(how)
    except MillstreamError as error:
        log.warning("what this worker held waits for the end of its lease: %s", error)
