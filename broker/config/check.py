"""Checks a whole configuration. Reports every error of a file in one run, each with its place, reason and fix."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from millstream.broker.config.file import ConfigFile
from millstream.broker.config.pools import check_pools
from millstream.broker.config.reasons import reason_of
from millstream.broker.config.route_check import check_routes
from millstream.broker.config.spec import ModelSpec, discard, no_cache, with_defaults
from millstream.broker.config.yaml import Document, KeyPath
from millstream.broker.contract.errors import did_you_mean
from millstream.broker.contract.operations import OPERATIONS, UPSTREAM_BACKENDS, types_with

Found = Iterable[tuple[KeyPath, str]]


def check(document: Document) -> ConfigFile:
    """Returns the document as models, with defaults filled in.

    Reports each invalid value to `document.problems` and omits it from the result.
    """
    file = _validate(document)
    reported = {problem.path for problem in document.problems}
    for path, reason in list(_problems(file, document)):
        if path not in reported:
            document.report(path, reason)
    return file


def _problems(file: ConfigFile, document: Document) -> Found:
    yield from _unnamed_models(file)
    if file.webhooks.allow and not file.webhooks.secret_file:
        yield ("webhooks", "secret_file"), "missing; name a file with the secret that signs what is sent"
    yield from _unknown_models(file, document)
    yield from _routes(file, document)
    yield from _pools(file, document)
    yield from _long_timeouts(file, document)
    yield from _impossible_caches(file)
    yield from _impossible_slots(file)
    yield from _tenants(file)
    for name, model in file.models.items():
        if model.device and model.devices:
            yield ("models", name, "devices"), "device is set too; keep one of them"
        if model.is_upstream:
            yield from _upstreams(name, model)
        else:
            yield from _backends(name, model)
            yield from _kernels(name, model)
            yield from _urls(name, model)
        yield from _kinds(name, model)


def _validate(document: Document) -> ConfigFile:
    tree = _with_defaults(document.tree)
    reported: set[KeyPath] = set()
    while True:
        try:
            return ConfigFile.model_validate(tree)
        except ValidationError as error:
            for each in error.errors():
                path = tuple(str(step) for step in each["loc"] if step != "[key]")
                # A required key may be missing only because the previous round removed its invalid value.
                if path not in reported:
                    reported.add(path)
                    document.report(path, reason_of(each, path, document))
            for each in error.errors():
                loc = each["loc"]
                discard(tree, loc[:-1] if each["type"] == "missing" or loc[-1] == "[key]" else loc)


def _with_defaults(original: Mapping[str, object]) -> dict[str, object]:
    tree = copy.deepcopy(dict(original))
    models = _mapping(tree.get("models"))
    for entry in _mapping(tree.get("services")).values():
        runtime = _mapping(entry).get("runtime") or {}
        if isinstance(entry, dict) and isinstance(runtime, dict):
            model = _mapping(models.get(str(entry.get("model"))))
            entry["runtime"] = with_defaults(str(model.get("type")), runtime)
    return tree


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _unnamed_models(file: ConfigFile) -> Found:
    for name, model in file.models.items():
        operation = model.operation
        if operation.needs_code and not model.handler:
            yield ("models", name, "handler"), "missing; name the code to run, as in my_module:process"
        if model.handler and not operation.needs_code:
            those = types_with(lambda each: each.needs_code)
            yield ("models", name, "handler"), f"only type {those} runs code, this is {model.type}; change one of them"
        if operation.needs_weights and not model.model_name:
            fix = "name a folder, a hub model, or package:<package>/<folder>"
            yield ("models", name, "model_name"), f"missing; {fix}"


def _backends(name: str, model: ModelSpec) -> Found:
    path: KeyPath = ("models", name)
    if model.backend == "torch":
        if model.model_file:
            yield (*path, "model_file"), "only backend onnx or openvino reads it, this is torch; change one of them"
        return
    if model.kind != "auto":
        yield (*path, "backend"), f"kind {model.kind} runs only with torch; leave backend out"
    if not model.operation.one_forward:
        yield (*path, "backend"), f"type {model.type} runs only with torch; leave backend out"
    for key in ("dtype", "attention"):
        if getattr(model, key) != ModelSpec.model_fields[key].default:
            yield (*path, key), f"an exported file has its own {key}; leave it out, or name another model_file"


_SERVERS_OWN = ("device", "devices", "revision", "dtype", "attention", "kernels", "model_file", "max_length", "warmup")
"""Keys of a model that have no effect if a server that already runs computes the results."""


def _upstreams(name: str, model: ModelSpec) -> Found:
    path: KeyPath = ("models", name)
    known = OPERATIONS[model.type].upstreams
    if model.backend not in known:
        those = types_with(lambda each: model.backend in each.upstreams)
        other = f"name {' or '.join(known)}" if known else "leave backend out"
        yield (*path, "backend"), f"runs only types {those}, this is {model.type}; {other}"
        return
    if not model.url:
        yield (*path, "url"), f"missing; name the server of backend {model.backend}, as in http://localhost:8000/v1"
    if not model.model_name and OPERATIONS[model.type].needs_weights:
        yield (*path, "model_name"), "missing; name the model as the server at url does"
    if model.api_key_file and model.api_key_env:
        yield (*path, "api_key_env"), "api_key_file is set too; keep one of them"
    for key in _SERVERS_OWN:
        if getattr(model, key) != ModelSpec.model_fields[key].default:
            yield (*path, key), f"has no effect: the server of backend {model.backend} decides it; leave it out"


def _urls(name: str, model: ModelSpec) -> Found:
    for key in ("url", "api_key_file", "api_key_env"):
        if getattr(model, key):
            those = ", ".join(sorted(UPSTREAM_BACKENDS))
            yield ("models", name, key), f"backend {model.backend} uses no server; name a backend of {those}"


def _kernels(name: str, model: ModelSpec) -> Found:
    if model.kernels != "auto" and not model.operation.needs_weights:
        those = types_with(lambda each: each.needs_weights)
        reason = f"only types {those} have kernels, this is {model.type}; leave kernels out"
        yield ("models", name, "kernels"), reason


def _kinds(name: str, model: ModelSpec) -> Found:
    if model.kind != "auto" and model.kind not in model.operation.kinds:
        those = types_with(lambda each: model.kind in each.kinds)
        yield ("models", name, "kind"), f"only type {those} has it, this is {model.type}; leave kind out"


def _unknown_models(file: ConfigFile, document: Document) -> Found:
    known = list(_mapping(document.tree.get("models")))
    # The file as it is written: an entry with another mistake is not in `file`.
    for name, written in _mapping(document.tree.get("services")).items():
        if isinstance(written, dict) and written.get("model") is None and written.get("route") is None:
            yield ("services", name, "model"), f"missing; name one of: {', '.join(known)}"
    for name, entry in file.services.items():
        if entry.model is not None and entry.model not in known:
            close = did_you_mean(entry.model, known)
            fix = f"did you mean {close}?" if close else f"known are: {', '.join(known) or 'none'}"
            yield ("services", name, "model"), f"no model named {entry.model}; {fix}"


def _routes(file: ConfigFile, document: Document) -> Found:
    written = _mapping(document.tree.get("services"))
    for name, entry in file.services.items():
        if entry.model is None and entry.route and _mapping(written.get(name)).get("runtime") is not None:
            yield ("services", name, "runtime"), "has no effect on a route; set it for the services of its versions"
    models = {name: file.models.get(entry.model) for name, entry in file.services.items() if entry.model is not None}
    routes = {name: entry.route for name, entry in file.services.items() if entry.route}
    yield from check_routes(routes, {name: model.operation if model else None for name, model in models.items()})


def _pools(file: ConfigFile, document: Document) -> Found:
    written = _mapping(document.tree.get("services"))
    known = [name for name, entry in written.items() if _mapping(entry).get("model") is not None]
    models = {name: file.models.get(entry.model) for name, entry in file.services.items() if entry.model is not None}
    yield from check_pools(file.pools, models, known)


def _impossible_caches(file: ConfigFile) -> Found:
    for name, entry in file.services.items():
        model = file.models.get(entry.model or "")
        if model and model.operation.uncached and entry.runtime.enable_cache:
            yield ("services", name, "runtime", "enable_cache"), no_cache(model.operation)


def _impossible_slots(file: ConfigFile) -> Found:
    for name, entry in file.services.items():
        path, runtime, model = (
            ("services", name, "runtime", "reserved_slots"),
            entry.runtime,
            file.models.get(entry.model or ""),
        )
        if runtime.reserved_slots and model and not model.operation.streams:
            those = types_with(lambda each: each.streams)
            yield path, f"only type {those} has slots, this is {model.type}; leave it out"
        elif runtime.reserved_slots and runtime.reserved_slots >= runtime.batch_size:
            yield path, f"all {runtime.batch_size} slots of batch_size would be reserved; lower it or raise batch_size"


def _tenants(file: ConfigFile) -> Found:
    for name, entry in file.services.items():
        path: KeyPath = ("services", name, "runtime", "max_queue_size", "per_tenant")
        if entry.runtime.tenant_jobs and not entry.runtime.fair:
            yield path, "only a service with fair counts the jobs of a tenant; set fair: tenant, or leave it out"


_AT_MOST = (
    ("queue_timeout", "total_timeout"),
    ("inference_timeout", "total_timeout"),
    ("inference_timeout", "stall_timeout"),
)


def _long_timeouts(file: ConfigFile, document: Document) -> Found:
    for name, entry in file.services.items():
        path: KeyPath = ("services", name, "runtime")
        service = entry.runtime.model_dump()
        yield from _contradictions(path, service, document)
        for priority, limits in entry.runtime.priorities.items():
            own = limits.model_dump(exclude_none=True)
            if own.keys() & {name for pair in _AT_MOST for name in pair}:
                yield from _contradictions((*path, "priorities", priority), service | own, document)


def _contradictions(path: KeyPath, limits: Mapping[str, float | None], document: Document) -> Found:
    # An invalid value was removed, so `limits` has its default: comparing that would report a false contradiction.
    invalid = {problem.path[-1] for problem in document.problems if problem.path[:2] == path[:2]}
    for inner, outer in _AT_MOST:
        short, long = limits[inner], limits[outer]
        if short is not None and long is not None and short > long and not {inner, outer} & invalid:
            key = inner if (*path, inner) in document.places else outer
            yield (*path, key), f"{inner} ({short:g} s) is longer than {outer} ({long:g} s); lower it or raise {outer}"
