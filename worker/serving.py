"""Runs a Python function as a service within its own program: `serve` is a worker without a supervisor."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

from millstream.broker.config.load import given_service
from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import (
    ConfigError,
    InvalidRequest,
    MillstreamError,
    ServicePaused,
    UnknownService,
    described,
)
from millstream.broker.queue.registry import Registry
from millstream.broker.target import find_target
from millstream.broker.transport.connection import Connection
from millstream.broker.transport.connection import check as check_server
from millstream.worker.isolation import Takeover
from millstream.worker.models.custom import CustomModel, Hooks, name_of
from millstream.worker.process import STALLED, Worker
from millstream.worker.shutdown import Ended, Relay
from millstream.worker.supervision.charging import NOT_CHARGED, Charged, End
from millstream.worker.supervision.child_args import ChildArgs, Hosted, new_consumer
from millstream.worker.supervision.orders import Orders
from millstream.worker.supervision.progress import Progress

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between two checks whether the function is stuck."""


ORDER_S = 1.0
"""Seconds between two looks for orders of operators."""


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
    """Runs `service` with `process_fn(payloads) -> results`, in this process, until SIGTERM or Ctrl-C; then drains.

    `process_fn` is a function, an object that can be called, or a class of such objects; it gets a list of payloads,
    any JSON, and gives one result for each, in order: a list of JSON values, or an array, float32 [payloads, dim].
    `cost(payload)`, `check(payload)`, `set_up(device)` and `tear_down()`, or methods of these names: see Hooks.

    The server is found as `Client` finds it. If the service is not registered, it is registered with `limits`: the
    settings of `runtime` in config.yaml, such as batch_size, batch_timeout, max_queue_size, total_timeout and
    stall_timeout. If it is registered, its limits stay; other `limits` need `replace`, as does another function.

    No supervisor watches this process. If it fails or exceeds stall_timeout (it then ends with status 1), it gives its
    jobs back itself. If it is killed, other workers of the service, or the next one, give them back when its lease of
    5 s is over. A second signal ends the process at once, by the handler that was set before. `millstream worker drain`
    and `stop` are as one signal and as two.

    Raises ConfigError if limits are wrong or differ from the registered ones, ModelUnavailable if the function cannot
    be set up, InvalidRequest if this is not the main thread, BrokerUnavailable if the server cannot be used,
    ServicePaused if an operator keeps this host empty.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InvalidRequest("serve must run in the main thread of its process, since it handles signals")
    target = find_target(url, prefix, os.environ)
    connection = Connection(target.url, name="millstream-worker")
    try:
        check_server(connection, allow_eviction=target.allow_eviction)
        _register(Registry(connection, target.prefix), service, limits, replace)
        _check_orders(Orders(connection, target.prefix, [service]), service)
    finally:
        connection.close()
    hooks = Hooks(cost, check, set_up, tear_down)

    def load(spec: ServiceSpec) -> CustomModel:
        return CustomModel(process_fn, name_of(process_fn), spec.runtime, device, hooks)

    progress = Progress.create()
    hosted = [Hosted(service, progress.fd)]
    child_args = ChildArgs(hosted, target.prefix, new_consumer(), device, threads=1, supervised=False)
    worker = Worker(child_args, target.url, load)
    signals = _Signals(worker)
    with ExitStack() as ends:
        ends.callback(progress.close)
        ends.callback(worker.close)
        ends.enter_context(suppress(Ended))
        ends.enter_context(_giving_back(worker))
        ends.enter_context(_watched(worker))
        ends.enter_context(signals.handled())
        ends.enter_context(_ordered(child_args, target.url))
        worker.work()
    if signals.second:
        signal.raise_signal(signals.second)


def _register(registry: Registry, service: str, limits: Mapping[str, object], replace: bool) -> None:
    """Registers the service, with these limits if any are given. Raises ConfigError, BrokerUnavailable."""
    try:
        registered = registry.read(service)
    except UnknownService:
        registered = None
    if registered and not registered.model.operation.needs_code:
        raise ConfigError(
            f"service {service!r} is registered with type {registered.model.type!r}", hint="choose another name"
        )
    if registered is None or limits or replace:
        registry.push([_merged_spec(service, registered, limits)], replace=replace)


def _merged_spec(service: str, registered: ServiceSpec | None, limits: Mapping[str, object]) -> ServiceSpec:
    """The registered service with `limits` applied; a new one if none is registered. Raises ConfigError."""
    if registered is None:
        return given_service(service, limits)
    if not limits:
        return registered
    runtime = given_service(service, {"worker_count": registered.runtime.worker_count, **limits}).runtime
    return registered.model_copy(update={"runtime": runtime})


class _Signals:
    """Drains at the first signal and ends the process at the second, noted in `second`; a third has its old handler.

    If no job was claimed yet, the first signal ends the process at once.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.second = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        self._relay = Relay(self._worker.drain)
        self._takeover = Takeover((signal.SIGINT, signal.SIGTERM), self._drain)
        try:
            yield
        finally:
            self._takeover.end()
            self._relay.close()

    def _drain(self, number: int, frame: FrameType | None) -> None:
        for each, before in self._takeover.before.items():
            signal.signal(each, before if before == signal.SIG_IGN else self._end)
        if self._worker.starting:
            raise Ended
        self._relay.ring()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._takeover.end()
        self.second = number
        raise Ended


@contextmanager
def _giving_back(worker: Worker) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not worker.starting:
            if isinstance(error, Ended):
                _give_back(worker, End("was ended by a signal"))
            else:
                _give_back(worker, End("failed", why=described(error)), worker.snapshots())
        raise


@contextmanager
def _watched(worker: Worker) -> Iterator[None]:
    """Runs a thread meanwhile that ends this process if the function or a hook is stuck: there is no supervisor."""

    def look() -> None:
        if stuck := worker.stuck():
            log.error("no progress for longer than stall_timeout: this process ends")
            _give_back(worker, End(STALLED), stuck)
            logging.shutdown()
            os._exit(1)

    with _repeated("watch", LOOK_S, look):
        yield


def _check_orders(orders: Orders, service: str) -> None:
    """Raises ServicePaused if an operator keeps this host empty."""
    orders.read()
    if orders.find([service], ""):
        raise ServicePaused(
            f"an operator keeps {orders.host} without workers of service {service!r}",
            hint=f"`millstream worker start {orders.host}` lets them start",
        )


@contextmanager
def _ordered(child_args: ChildArgs, url: str) -> Iterator[None]:
    """Runs a thread meanwhile that follows the orders of operators: a drain is one signal, a stop two."""
    services = [each.service for each in child_args.hosted]
    connection = Connection(url, name="millstream-orders")
    orders = Orders(connection, child_args.prefix, services)
    numbers = [signal.SIGTERM, signal.SIGTERM]

    def look() -> None:
        orders.read()
        order = orders.find(services, child_args.consumer)
        if order and len(numbers) > (0 if order == "stop" else 1):
            os.kill(os.getpid(), numbers.pop())

    try:
        with _repeated("orders", ORDER_S, look):
            yield
    finally:
        connection.close()


@contextmanager
def _repeated(name: str, seconds: float, look: Callable[[], object]) -> Iterator[None]:
    """Runs a thread meanwhile that calls `look` every `seconds`."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            look()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _give_back(worker: Worker, end: End, charged: Charged = NOT_CHARGED) -> None:
    try:
        worker.give_back(end, charged)
    except MillstreamError as error:
        log.warning("the jobs of this worker wait for the end of its lease: %s", error)
