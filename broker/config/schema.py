"""The JSON Schema of config.yaml, for editors: what they complete, explain and underline while somebody types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from pydantic.json_schema import JsonSchemaValue

from millstream.broker.config.check import ConfigFile, Entry
from millstream.broker.config.spec import PRESETS, SERVICE_NAME, TYPE_DEFAULTS

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The newest one that editors support in full."""

DESCRIPTIONS: Mapping[str, str] = {
    "models": "Models by name; services refer to them.",
    "services": "Services by name: a queue each, as in client.submit(NAME, ...).",
    "redis": "Where the queue lives.",
    "type": "What the model does.",
    "model_name": "The weights: a folder, a model of the hub, or package:PACKAGE/FOLDER inside an installed package.",
    "device": "cpu, cuda, cuda:1 or mps; by default the best the host has.",
    "devices": "Devices that the worker processes take in turn, instead of `device`.",
    "revision": "Branch, tag or commit on the hub.",
    "dtype": "Anything but float32 changes the vectors.",
    "attention": "How attention is computed; auto is what the model library takes by itself.",
    "kernels": "Whether packed texts and oneDNN's linear layers may replace the library's own forward; off: never.",
    "backend": "What runs the weights; onnx and openvino take an exported file from the model's folder.",
    "model_file": "Which exported file, below the model's folder; by default model.onnx or openvino_model.xml.",
    "max_length": "Longest text, in tokens; by default the model's own limit.",
    "warmup": "Whether to run the model once before the first job.",
    "priority": "Which model is loaded first.",
    "handler": "MODULE:FUNCTION to run for a model of type custom, found beside config.yaml or installed.",
    "model": "The model's name under `models`.",
    "runtime": "The service's limits.",
    "batch_size": "Most rows in one forward pass.",
    "batch_timeout": "Longest wait for a batch to fill while the model is idle.",
    "max_queue_size": "Most jobs held; beyond that, callers get QueueFull.",
    "worker_count": "Worker processes on each host that runs `millstream up`.",
    "queue_timeout": "Longest wait until a job starts to run; none: no limit.",
    "inference_timeout": "Longest time of one job in the model; none: no limit.",
    "total_timeout": "Longest time without any answer to a call, unless it gives its own timeout; none: no limit.",
    "rate_limit": "Calls a second, or a mapping of what to limit; none: no limit.",
    "enable_cache": "Answer repeated rows from Redis, for `cache_ttl`.",
    "cache_ttl": "How long an answer is kept for repeated rows; by default 1h.",
    "preset": "; ".join(
        f"{name}: {values['batch_size']} rows, {values['batch_timeout']} s" for name, values in PRESETS.items()
    ),
    "max_batch_tokens": "Most tokens in one forward pass, padding included; auto: measured when a worker starts.",
    "stall_timeout": "A worker that makes no progress with its jobs for this long is killed and started again.",
    "max_attempts": "Starts that ended in a crash before a job goes to the dead letters.",
    "memory_limit": "Most memory of one worker process.",
    "truncate": "Texts that are too long: none is an error, start cuts their start off, end their end.",
    "priorities": "What differs for realtime, normal or batch.",
    "share": "The priority's share of the workers while all priorities have jobs waiting.",
    "requests": "Calls a second.",
    "rows": "Rows a second.",
    "tokens": "Tokens a second.",
    "burst": "Most at once; by default one second's worth.",
    "per": "tenant: each tenant has a limit of its own.",
    "url": "By default MILLSTREAM_REDIS_URL, or else a server that `millstream up` starts.",
    "password_file": "A file whose first line is the password, which then stands nowhere else.",
    "insecure": "Use a server on another host without TLS and password.",
    "allow_eviction": "Use a server that deletes keys when its memory is full: jobs may be lost.",
    "key_prefix": "Start of every key, to share a server.",
    "result_ttl": "How long the results of a detached call are kept after the last one.",
    "durability": "How soon the server that `millstream up` starts syncs a write to disk; replicated, for a server "
    "with replicas: jobs are accepted once a replica has them.",
    "data_dir": "Where the server that `millstream up` starts keeps its data.",
}

_TIME = 'Seconds, or text with a unit: "10ms", "5s", "5m", "2h".'
_BYTES = 'Bytes, or text with a unit: "64MB", "2GiB".'


def schema() -> JsonSchemaValue:
    """The schema of a file as it is written, before presets and variables: nothing but its form."""
    made = ConfigFile.model_json_schema()
    definitions = cast(dict[str, JsonSchemaValue], made["$defs"])
    for part in (made, *definitions.values()):
        _explain(part)
    # A service may leave it out.
    definitions[Entry.__name__]["required"].remove("runtime")
    services = made["properties"]["services"]["anyOf"][0]
    services["propertyNames"] = {"pattern": f"^{SERVICE_NAME}$"}
    return {"$schema": DIALECT, **made, "title": "millstream's config.yaml"}


def _explain(section: JsonSchemaValue) -> None:
    """Give each key of a section its description, and only the default it has under every preset and type."""
    section.pop("title", None)
    for key, value in section["properties"].items():
        value.pop("title", None)
        if key in _VARYING or not isinstance(value.get("default"), str | int | float) or value["default"] == "":
            value.pop("default", None)
        value["description"] = " ".join([DESCRIPTIONS[key], *_units(value)])


_VARYING = {key for values in (*PRESETS.values(), *TYPE_DEFAULTS.values()) for key in values}


def _units(value: JsonSchemaValue) -> Iterator[str]:
    patterns = [choice.get("pattern", "") for choice in value.get("anyOf", [])]
    yield from (_TIME for pattern in patterns if "ms" in pattern)
    yield from (_BYTES for pattern in patterns if "kKmMgG" in pattern)
