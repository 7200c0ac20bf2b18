"""Runs any function as a model: it gets payloads and returns results.

The function is named in this host's own config.yaml, or is an argument of `serve`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import marshal
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np

from millstream.broker.config.load import Runtime, ServiceSpec
from millstream.broker.contract.errors import (
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    ModelUnavailable,
    described,
    message_of,
)
from millstream.broker.contract.job import Json, Vectors
from millstream.broker.contract.operations import CALL
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.models.loading.source import handler_of
from millstream.worker.shutdown import Ended

log = logging.getLogger(__name__)

ProcessFn = Callable[[list[Json]], object]
"""Returns one result for each payload, in order.

They are a list of JSON values, vectors or errors, or an array, float32 [payloads, dim].
"""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Optional functions beside a process function. `check` and `cost` run in another thread than the process function.

    `cost` returns the size of a payload, in the unit of max_batch_tokens. `check` raises ValueError for a payload that
    must not run. `set_up` is called before the first payload with the device of config.yaml, None if it names none.
    `tear_down` is called after the last payload.
    """

    cost: Callable[[Json], int] | None = None
    check: Callable[[Json], object] | None = None
    set_up: Callable[[str | None], object] | None = None
    tear_down: Callable[[], object] | None = None

    def beside(self, handler: object) -> Hooks:
        """Returns these hooks, completed by the methods of `handler` that have the same names."""
        return Hooks(*(getattr(self, each.name) or getattr(handler, each.name, None) for each in fields(Hooks)))


class CustomModel:
    """Runs `handler`: a function, a callable object, or a class of callable objects. Messages use `name`.

    Without `cost` each payload counts an equal share of a batch. Raises ModelUnavailable if the class cannot be
    constructed or set up.
    """

    op = CALL.op
    sample_options = NO_OPTIONS

    def __init__(
        self, handler: object, name: str, runtime: Runtime, device: str | None, hooks: Hooks | None = None
    ) -> None:
        self._process = self._construct(handler, name)
        self._hooks = (hooks or Hooks()).beside(self._process)
        self._lap: Callable[[], None] = lambda: None
        self.adapt(runtime)
        self.fingerprint = name
        if self._hooks.set_up:
            try:
                self._hooks.set_up(device)
            except Ended:
                raise
            except BaseException as error:
                raise _handler_error(name, "cannot be set up", error) from error

    def _construct(self, handler: object, name: str) -> ProcessFn:
        if isinstance(handler, type):
            try:
                handler = handler()
            except Ended:
                raise
            except BaseException as error:
                raise _handler_error(name, "cannot be constructed", error) from error
        how = "give def process(payloads), or a class with __call__(self, payloads)"
        if not callable(handler):
            raise ModelUnavailable(f"handler {name!r} is no function but {type(handler).__name__}", hint=how)
        if any(map(inspect.iscoroutinefunction, (handler, type(handler).__call__))):
            raise ModelUnavailable(f"handler {name!r} is async, but it is called without await", hint=how)
        return cast(ProcessFn, handler)

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        try:
            CALL.check(options)
        except InvalidRequest as error:
            return [error] * len(inputs)
        return [self._row(payload) for payload in inputs]

    def _row(self, payload: Json) -> Prepared | MillstreamError:
        hooks = self._hooks
        self._lap()
        try:
            if hooks.check:
                hooks.check(_copy(payload))
        except ValueError as error:
            return InvalidRequest(message_of(error))
        except BaseException as error:  # noqa: BLE001 - any failure is this payload's: also a sys.exit or a panic
            return ModelFailed(f"check: {described(error)}")
        try:
            tokens = hooks.cost(_copy(payload)) if hooks.cost else self._row_tokens
        except BaseException as error:  # noqa: BLE001 - as above
            return ModelFailed(f"cost: {described(error)}")
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            return ModelFailed(f"cost returned {tokens!r}"[:500], hint="return a whole number of at least 1")
        return Prepared(tokens, payload)

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
        # Copies: if the function changes its payloads and then fails, it is called again with the same payloads.
        payloads = [_copy(cast(Json, row.features)) for row in rows]
        return _results(self._process(payloads))

    def lap_by(self, lap: Callable[[], None]) -> None:
        self._lap = lap

    def adapt(self, runtime: Runtime) -> None:
        self._row_tokens = runtime.row_tokens

    def samples(self, tokens: int) -> Sequence[Json]:
        return ()

    def close(self) -> None:
        if self._hooks.tear_down:
            try:
                self._hooks.tear_down()
            except Ended:
                raise
            except BaseException:
                log.exception("tear_down failed")


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> CustomModel:
    """Returns the model that runs the handler of `spec`. Raises ModelUnavailable.

    The code is searched in the installed packages, then in `folder`.
    """
    # torch and similar libraries read it at import. Without it, each of several workers would use all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    handler = handler_of(spec)
    return CustomModel(load_handler(handler, folder), handler, spec.runtime, device)


def load_handler(target: str, folder: str) -> object:
    """Returns the object that `target`, `module:attribute`, names. Raises ModelUnavailable if there is none.

    `folder` is appended to the import path.
    """
    # Appended, not prepended: a user's random.py or client.py must not replace a library's module, or ours.
    if folder and folder not in sys.path:
        sys.path.append(folder)
    module_name, _, path = target.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except Ended:
        raise
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ModelUnavailable(
                f"handler {target!r}: there is no module {missing!r}",
                hint=f"put it into {folder or 'the folder of config.yaml'}, or install it",
            ) from None
        raise _handler_error(target, f"module {module_name!r} cannot be imported", error) from error
    file = getattr(found, "__file__", None) or module_name
    log.info("handler %s of %s", target, file)
    for name in path.split("."):
        if not hasattr(found, name):
            raise ModelUnavailable(f"handler {target!r}: there is no {name!r} in {file}", hint="check its spelling")
        found = getattr(found, name)
    return found


def name_of(handler: object) -> str:
    """Returns `module:name` of a function, a class or the class of an object, as config.yaml would name it.

    If the module is `__main__`, as in every program, the name of its file takes its place.
    """
    named = handler if hasattr(handler, "__qualname__") else type(handler)
    module = getattr(named, "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None) if module == "__main__" else None
    return f"{Path(file).name if file else module}:{named.__qualname__}"


def _handler_error(name: str, what: str, error: BaseException) -> ModelUnavailable:
    reason = " ".join(described(error).split())
    return ModelUnavailable(f"handler {name!r} {what}: {reason}", hint=_location(error))


def _location(error: BaseException) -> str:
    """Returns `file:line`, the last line in the user's own files that raised `error`; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [each for each in traceback.extract_tb(error.__traceback__) if _is_own(Path(each.filename))]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _is_own(file: Path) -> bool:
    """Returns whether `file` is the user's: not Python's, not an installed package's, and not this module."""
    not_own = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")} | {Path(__file__)}
    return file.is_file() and not not_own.intersection((file, *file.parents))


def _copy(payload: Json) -> Json:
    return cast(Json, marshal.loads(marshal.dumps(payload))) if isinstance(payload, dict | list) else payload


def _results(answer: object) -> Vectors | list[Json]:
    """Converts the return value of a process function to the results of a forward. Raises ModelFailed."""
    if isinstance(answer, np.ndarray) and answer.ndim == 2 and answer.dtype.kind in "fiu":
        # A copy: the function may reuse its own array.
        return np.array(answer, np.float32)
    if isinstance(answer, np.ndarray) and answer.ndim == 1 and answer.dtype.kind in "fiub":
        return cast(list[Json], answer.tolist())
    if isinstance(answer, list | tuple):
        return cast(list[Json], [_result(each) for each in answer])
    raise ModelFailed(
        f"process_fn returned {type(answer).__name__}",
        hint="return a list with one result for each payload, or an array [payloads, dim]",
    )


def _result(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.kind not in "fiu":
            return ModelFailed(f"process_fn returned an array {value.dtype} {list(value.shape)}, not a vector [dim]")
        return np.array(value, np.float32)
    # Not Exception: asyncio.gather returns CancelledError, which is a BaseException only.
    if isinstance(value, BaseException) and not isinstance(value, MillstreamError):
        return ModelFailed(described(value))
    return value
