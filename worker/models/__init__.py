"""Models that a worker can run. Only this package imports torch and the model libraries."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.operations import RUNNABLE
from millstream.worker.measuring.memory_use import Meter, ProcessMemory
from millstream.worker.models.base import Model, Prepared, packs

__all__ = ["Loader", "Model", "Prepared", "load", "meter_of", "packs"]

Loader = Callable[[ServiceSpec, str | None, int, str], Model]
"""Loads the model of a service, as `load` does. The module of each type of model has one."""


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str = "") -> Model:
    """Returns the loaded model of `spec`. Raises ModelUnavailable if it cannot be loaded.

    Only the module of the model's type is imported, and with it torch if the type needs it. The code of a custom model
    is searched in the installed packages, then in `folder`.
    """
    return loader_of(spec)(spec, device, threads, folder)


def meter_of(device: str | None) -> Meter:
    """Returns the meter of the memory in which models on `device` lie."""
    if device and device.startswith("cuda"):
        from millstream.worker.models.device_memory import CudaMemory

        return CudaMemory(device)
    return ProcessMemory()


def loader_of(spec: ServiceSpec) -> Loader:
    """Returns the function that loads the model of `spec`. Raises ModelUnavailable if none is installed here."""
    operation = spec.model.operation
    if not operation.runs:
        raise ModelUnavailable(
            f"service {spec.name!r}: this version cannot run models of type {spec.model.type!r}",
            hint=f"types that can run: {', '.join(RUNNABLE)}",
        )
    module, _, name = operation.loader.partition(":")
    try:
        return cast(Loader, getattr(importlib.import_module(module), name))
    except ModuleNotFoundError as error:
        raise ModelUnavailable(
            f"service {spec.name!r} needs {error.name}, which is not installed",
            hint=f'pip install "millstream[{"upstream" if spec.model.is_upstream else "worker"}]"',
        ) from None
