"""Any function as a model: payloads in, results out. The code is named by this host's own file, or given to `serve`."""

from __future__ import annotations

import importlib
import inspect
import logging
import marshal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np

from millstream.broker.config.load import Runtime
from millstream.broker.contract.errors import (
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    ModelUnavailable,
    described,
    message_of,
)
from millstream.broker.contract.job import Json, Vectors
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.shutdown import Ended

log = logging.getLogger(__name__)

ProcessFn = Callable[[list[Json]], object]
"""One result a payload, in order: a list of JSON values, vectors or errors; or an array, float32 [payloads, dim]."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What may stand beside a process function. `check` and `cost` run in another thread than it does.

    `cost` is a payload's size, in the unit of max_batch_tokens; `check` raises ValueError for a payload that is not to
    run. `set_up` gets the device of config.yaml, None where it names none, before the first payload; `tear_down` is
    called after the last one.
    """

    cost: Callable[[Json], int] | None = None
    check: Callable[[Json], object] | None = None
    set_up: Callable[[str | None], object] | None = None
    tear_down: Callable[[], object] | None = None

    def beside(self, handler: object) -> Hooks:
        """These, and those that are methods of `handler`."""
        return Hooks(*(getattr(self, each.name) or getattr(handler, each.name, None) for each in fields(Hooks)))


class CustomModel:
    """Runs `handler`, a function, an object that can be called, or a class of such objects; `name` is for messages.

    Without a `cost` a payload counts an equal share of a batch. Raises ModelUnavailable where the class cannot be
    constructed or set up.
    """

    op = "call"
    sample_options = NO_OPTIONS

    def __init__(
        self, handler: object, name: str, runtime: Runtime, device: str | None, hooks: Hooks | None = None
    ) -> None:
        self._process = self._begun(handler, name)
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
                raise _unavailable(name, "cannot be set up", error) from error

    def _begun(self, handler: object, name: str) -> ProcessFn:
        if isinstance(handler, type):
            try:
                handler = handler()
            except Ended:
                raise
            except BaseException as error:
                raise _unavailable(name, "cannot be constructed", error) from error
        how = "give def process(payloads), or a class with __call__(self, payloads)"
        if not callable(handler):
            raise ModelUnavailable(f"handler {name!r} is no function but {type(handler).__name__}", hint=how)
        if any(map(inspect.iscoroutinefunction, (handler, type(handler).__call__))):
            raise ModelUnavailable(f"handler {name!r} is async, and nobody would await it", hint=how)
        return cast(ProcessFn, handler)

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        if options:
            return [InvalidRequest("a custom service takes no options", hint="put them into the payload")] * len(inputs)
        return [self._row(payload) for payload in inputs]

    def _row(self, payload: Json) -> Prepared | MillstreamError:
        hooks = self._hooks
        self._lap()
        try:
            if hooks.check:
                hooks.check(_copied(payload))
        except ValueError as error:
            return InvalidRequest(message_of(error))
        except BaseException as error:  # noqa: BLE001 - this payload's fault, whatever it is: a sys.exit, a panic
            return ModelFailed(f"check: {described(error)}")
        try:
            tokens = hooks.cost(_copied(payload)) if hooks.cost else self._row_tokens
        except BaseException as error:  # noqa: BLE001 - the same
            return ModelFailed(f"cost: {described(error)}")
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            return ModelFailed(f"cost gave {tokens!r}"[:500], hint="it gives a whole number of at least 1")
        return Prepared(tokens, payload)

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
        # Copies: a function that changes its payloads and then fails is called again with the same ones.
        payloads = [_copied(cast(Json, row.features)) for row in rows]
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


def load_handler(target: str, folder: str) -> object:
    """What `module:attribute` names, with `folder` as the last place to look for it. Raises ModelUnavailable."""
    # Last: a random.py or client.py of the user's must not be taken for the library's, or for ours.
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
        raise _unavailable(target, f"module {module_name!r} cannot be imported", error) from error
    file = getattr(found, "__file__", None) or module_name
    log.info("handler %s of %s", target, file)
    for name in path.split("."):
        if not hasattr(found, name):
            raise ModelUnavailable(f"handler {target!r}: there is no {name!r} in {file}", hint="check its spelling")
        found = getattr(found, name)
    return found


def name_of(handler: object) -> str:
    """`module:name` of a function, a class or an object's class: how a handler that is given would be written.

    Of a program's own the module is its file: each program calls itself `__main__`.
    """
    named = handler if hasattr(handler, "__qualname__") else type(handler)
    module = getattr(named, "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None) if module == "__main__" else None
    return f"{Path(file).name if file else module}:{named.__qualname__}"


def _unavailable(name: str, what: str, error: BaseException) -> ModelUnavailable:
    said = " ".join(described(error).split())
    return ModelUnavailable(f"handler {name!r} {what}: {said}", hint=_where(error))


def _where(error: BaseException) -> str:
    """The line that raised `error`: the last one in the user's own files, if any."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [each for each in traceback.extract_tb(error.__traceback__) if _is_own(Path(each.filename))]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _is_own(file: Path) -> bool:
    """Whether that is a file neither of Python, nor of an installed package, nor this one."""
    not_own = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")} | {Path(__file__)}
    return file.is_file() and not not_own.intersection((file, *file.parents))


def _copied(payload: Json) -> Json:
    return cast(Json, marshal.loads(marshal.dumps(payload))) if isinstance(payload, dict | list) else payload


def _results(answer: object) -> Vectors | list[Json]:
    """What a process function gave, as a model gives it."""
    if isinstance(answer, np.ndarray) and answer.ndim == 2 and answer.dtype.kind in "fiu":
        # A copy: a function may use its own array again.
        return np.array(answer, np.float32)
    if isinstance(answer, np.ndarray) and answer.ndim == 1 and answer.dtype.kind in "fiub":
        return cast(list[Json], answer.tolist())
    if isinstance(answer, list | tuple):
        return cast(list[Json], [_result(each) for each in answer])
    raise ModelFailed(
        f"process_fn gave {type(answer).__name__}",
        hint="it gives a list with a result for each payload, or an array [payloads, dim]",
    )


def _result(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.kind not in "fiu":
            return ModelFailed(f"process_fn gave an array {value.dtype} {list(value.shape)}, not a vector [dim]")
        return np.array(value, np.float32)
    # Not Exception: asyncio.gather gives CancelledError, which is none.
    if isinstance(value, BaseException) and not isinstance(value, MillstreamError):
        return ModelFailed(described(value))
    return value
