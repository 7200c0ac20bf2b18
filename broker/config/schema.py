"""The JSON Schema of config.yaml. Editors use it to complete and explain keys and to underline errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from pydantic.json_schema import JsonSchemaValue

from millstream.broker.config.fields import SERVICE_NAME
from millstream.broker.config.file import ConfigFile, Entry
from millstream.broker.config.spec import PRESETS
from millstream.broker.contract.operations import OPERATIONS

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The JSON Schema dialect: the newest one that editors support fully."""

DESCRIPTIONS: Mapping[str, str] = {
    "models": "Models by name; services refer to them.",
    "services": "Services by name: a queue each, as in client.submit(NAME, ...). Of a pool: those that it runs.",
    "pools": "Pools by name: processes that run several services, whose models may need more memory than there is.",
    "redis": "The Redis server that holds the queues.",
    "telemetry": "Logs and traces of this host's processes.",
    "webhooks": "The receivers that detached calls may name, and the secret that signs what they get.",
    "type": "Kind of the model.",
    "model_name": "The weights: a folder, a model of the hub, or package:PACKAGE/FOLDER inside an installed package.",
    "kind": "How the model is used, if not as its files say. query_likelihood: a causal language model ranks documents "
    "by the likelihood of the query after each.",
    "device": "cpu, cuda, cuda:1 or mps; by default the best device of the host.",
    "devices": "Devices, assigned to the worker processes in turn, instead of `device`.",
    "revision": "Branch, tag or commit on the hub.",
    "dtype": "Number type of the weights; any type but float32 changes the vectors.",
    "attention": "Implementation of attention; auto: the model library's default.",
    "kernels": "Whether faster code that proves equal may replace the library's own forward; off: never.",
    "backend": "Library that runs the weights, or kind of the server at `url`; onnx and openvino run an exported file "
    "from the model's folder.",
    "model_file": "The exported file, below the model's folder; by default model.onnx or openvino_model.xml.",
    "max_length": "Longest text, in tokens; by default the model's own limit.",
    "warmup": "Whether to run the model once before the first job.",
    "priority": "In a pool: of two models with late jobs the one with the smaller number comes first.",
    "keep": "In a pool: the model never leaves the memory.",
    "handler": "MODULE:FUNCTION to run for a model of type custom, found beside config.yaml or installed.",
    "model": "The model's name under `models`.",
    "runtime": "The service's limits.",
    "batch_size": "Most rows in one forward pass.",
    "batch_timeout": "Longest wait for a batch to fill while the model is idle.",
    "max_queue_size": "Most jobs of one priority in the queue; if it is full, callers get QueueFull. Of a service also "
    "a mapping with jobs and per_tenant.",
    "jobs": "Most jobs of one priority, those that run included.",
    "per_tenant": "Most jobs of one tenant that wait in one priority; needs `fair`.",
    "fair": "tenant: tenants that wait share the claims of each priority; or a mapping with weights.",
    "max_in_flight": "Most jobs of one tenant that workers hold at a time, of all priorities.",
    "weights": "A tenant's share relative to the others, which have 1.",
    "overflow": "Class in which calls beyond the limit run, instead of being refused: normal or batch.",
    "worker_count": "Worker processes on each host that runs `millstream up`.",
    "queue_timeout": "Longest wait until a job starts to run; none: no limit.",
    "inference_timeout": "Longest time of one job in the model; none: no limit.",
    "total_timeout": "Longest time without any answer to a call, unless it gives its own timeout; none: no limit.",
    "rate_limit": "Calls a second, or a mapping with requests, rows, tokens, burst, per and overflow; none: no limit.",
    "enable_cache": "Answer repeated rows from Redis, for `cache_ttl`.",
    "cache_ttl": "Time for which an answer is kept for repeated rows; by default 1h.",
    "preset": "; ".join(
        f"{name}: {values['batch_size']} rows, {values['batch_timeout']} s" for name, values in PRESETS.items()
    ),
    "max_batch_tokens": "Most tokens in one forward pass, padding included; auto: measured when a worker starts.",
    "stall_timeout": "A worker that makes no progress with its jobs for this long is killed and started again.",
    "max_attempts": "Attempts at a job that may end in a crash before it goes to the dead letters.",
    "memory_limit": "Most memory of the model and of its warm-up: one that is measured to need more is not loaded.",
    "truncate": "How to shorten texts that are too long: start or end cuts that part off; none: they are an error.",
    "reserved_slots": "Of the batch_size texts that a generating model writes at once, so many are realtime jobs only.",
    "target": "In a pool: response time to aim at for realtime and normal jobs; none: 1 s and 5 s.",
    "route": "Versions of this service that share its calls; each is a service of its own.",
    "versions": "The versions by name: a weight, or a weight and a service.",
    "weight": "The version's part of the calls, relative to the other weights.",
    "service": "The version's service; by default ROUTE@VERSION.",
    "sticky": "Callers that keep their version: those of one tenant, those with one sticky_key, or none. By default "
    "tenant for embedding and reranker services, or else none.",
    "fallback": "The version that runs a call again if its own version refuses it or fails.",
    "fallback_across_versions": "Allow a fallback for an embedding service, whose vectors of two versions differ.",
    "canary": "The canary that `millstream route canary start` begins.",
    "shadow": "Versions that get copies of calls to compare their answers, and the share of the calls, 0 to 1.",
    "to": "The version that gets more and more of the calls.",
    "steps": "Its parts of the calls, percent, one after the other.",
    "every": "Time of each step; then the version is judged.",
    "max_error_rate": "Share of its rows, 0 to 1, that may fail beyond the share of the other versions.",
    "max_p99_ratio": "How many times its p99 of the time to the answer may be that of the other versions.",
    "priorities": "Limits that differ for realtime, normal or batch.",
    "share": "The priority's share of the workers while all priorities have jobs waiting.",
    "requests": "Calls a second.",
    "rows": "Rows a second.",
    "tokens": "Tokens a second.",
    "burst": "Most at once; by default the limit of one second.",
    "per": "tenant: each tenant is counted by itself.",
    "url": "Of a model: the server that runs it, for backend openai, tei or ollama. Of redis: by default "
    "MILLSTREAM_REDIS_URL, or else a server that `millstream up` starts.",
    "api_key_file": "A file whose first line is the key of the server at `url`. Only this host's workers read it.",
    "api_key_env": "The environment variable that has the key of the server at `url`.",
    "password_file": "A file whose first line is the password, so that the password is in no other place.",
    "insecure": "Use a server on another host without TLS and password.",
    "allow_eviction": "Use a server that deletes keys when its memory is full: jobs may be lost.",
    "key_prefix": "Start of every key, so that several queues can share a server.",
    "result_ttl": "Time for which the results of a detached call are kept after the last one.",
    "durability": "How soon the server that `millstream up` starts syncs a write to disk: everysec or always. "
    "replicated, for a server with replicas: a job is accepted when a replica has it.",
    "log_format": "Log lines of workers and other long-running commands: text, or json, an object a line.",
    "log_level": "Least level of log messages: debug, info, warning or error; debug has a line for each batch.",
    "traces": "OpenTelemetry's traces. auto: clients trace if the program has set OpenTelemetry up, workers if an "
    "endpoint is set; on: the same, and an error if it is not possible; off: never.",
    "otlp_endpoint": "Collector that workers send spans to, by OTLP over HTTP; by default OTEL_EXPORTER_OTLP_ENDPOINT.",
    "allow": "Starts of the URLs that a call may name, such as https://hooks.example.com/millstream/.",
    "secret_file": "A file whose first line is the secret that signs announcements; further lines: further secrets. "
    "Only this host's `up` and `worker run` read it.",
    "memory": "Of a pool: most memory of its process, or of its CUDA device; none: no limit, and all models stay.",
    "workers": "Worker processes of the pool.",
    "min_residence": "Time for which a model stays at least; by default five times its load, and 2 s.",
    "data_dir": "Folder for the data of the server that `millstream up` starts.",
}

_TIME = 'Seconds, or text with a unit: "10ms", "5s", "5m", "2h".'
_BYTES = 'Bytes, or text with a unit: "64MB", "2GiB".'


def schema() -> JsonSchemaValue:
    """Returns the schema of a file as it is written. Presets and variables are not applied."""
    made = ConfigFile.model_json_schema()
    definitions = cast(dict[str, JsonSchemaValue], made["$defs"])
    for part in (made, *definitions.values()):
        _explain(part)
    # The check fills in a default runtime, so a file may omit it.
    definitions[Entry.__name__]["required"].remove("runtime")
    services = made["properties"]["services"]["anyOf"][0]
    services["propertyNames"] = {"pattern": f"^{SERVICE_NAME}$"}
    return {"$schema": DIALECT, **made, "title": "millstream's config.yaml"}


def _explain(section: JsonSchemaValue) -> None:
    """Adds each key's description. Removes a default that depends on the preset or the model's type."""
    section.pop("title", None)
    for key, value in section["properties"].items():
        value.pop("title", None)
        if key in _VARYING or not isinstance(value.get("default"), str | int | float) or value["default"] == "":
            value.pop("default", None)
        value["description"] = " ".join([DESCRIPTIONS[key], *_units(value)])


_BY_TYPE = [each.defaults for each in OPERATIONS.values()]
_VARYING = {key for values in (*PRESETS.values(), *_BY_TYPE) for key in values}


def _units(value: JsonSchemaValue) -> Iterator[str]:
    patterns = [choice.get("pattern", "") for choice in value.get("anyOf", [])]
    yield from (_TIME for pattern in patterns if "ms" in pattern)
    yield from (_BYTES for pattern in patterns if "kKmMgG" in pattern)
