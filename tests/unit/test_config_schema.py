"""The schema that editors read: it accepts what loads, and underlines what does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from configs import SMALL, USERS_FILE

from millstream.broker.config.schema import DESCRIPTIONS, schema
from millstream.cli.main import main

CONFIG = Path(__file__).parents[2] / "config.yaml"


def mistakes(text: str) -> list[str]:
    validator = jsonschema.Draft7Validator(schema())
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


def sections(part: object) -> Iterator[Mapping[str, Mapping[str, object]]]:
    """Every mapping of keys in the schema."""
    if isinstance(part, dict):
        if "properties" in part:
            yield part["properties"]
        for below in part.values():
            yield from sections(below)


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(schema())


def test_the_command_prints_it() -> None:
    assert json.loads(CliRunner().invoke(main, ["config", "schema"]).stdout) == schema()


def test_the_users_own_format_is_accepted() -> None:
    assert mistakes(USERS_FILE) == []


def test_the_repositorys_config_is_accepted_with_every_commented_option_too() -> None:
    text = CONFIG.read_text()

    assert mistakes(text) == []
    assert mistakes(re.sub(r"(?m)^( *)# ( *\w+:)", r"\1\2", text)) == []


@pytest.mark.parametrize(
    "runtime",
    [
        "batch_timeout: 10ms, queue_timeout: 0.5, total_timeout: none, stall_timeout: null, cache_ttl: 2 h",
        "memory_limit: 4GiB, max_batch_tokens: auto",
        "memory_limit: 1048576, max_batch_tokens: 99",
        "rate_limit: 5",
        "rate_limit: {rows: 1000, burst: 7, per: tenant}",
        "rate_limit: none",
        "priorities: {batch: {share: 0.2, queue_timeout: none, batch_timeout: 10ms}, realtime: {batch_timeout: 0}}",
        "priorities: {batch: }",
        "preset: latency, truncate: start",
        "",
    ],
)
def test_a_value_may_be_written_in_each_of_its_ways(runtime: str) -> None:
    assert mistakes(SMALL % ("embedding", runtime)) == []


@pytest.mark.parametrize("kernels", ["off", "'off'", "auto"])
def test_kernels_are_auto_or_off(kernels: str) -> None:
    assert mistakes(f"models: {{m: {{type: embedding, model_name: m, kernels: {kernels}}}}}") == []


@pytest.mark.parametrize(
    "text", ["models:\nservices:\n", "models: {m: {type: echo}}\nservices: {s: {model: m}}\nredis:"]
)
def test_sections_may_be_empty_or_left_out(text: str) -> None:
    assert mistakes(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "model: {}",
        "models: {m: {typ: echo}}",
        "models: {m: {type: eco}}",
        "models: {m: {type: echo, devices: cpu}}",
        "models: {m: {type: embedding, model_name: m, kernels: on}}",
        "models: {m: {type: embedding, model_name: m, kernels: of}}",
        "services: {s: {modl: m}}",
        "services: {s: {model: m, batch_size: 3}}",
        "services: {'a b': {model: m}}",
        "redis: {prefix: ms}",
        "redis: {result_ttl: 0}",
        "redis: {durability: never}",
        *(
            SMALL % ("echo", runtime)
            for runtime in (
                "batch_sise: 3",
                "batch_size: 0",
                "batch_size: many",
                "batch_timeout: -1",
                "batch_timeout: 10 msec",
                "queue_timeout: soon",
                "total_timeout: 0",
                "memory_limit: 4 gigs",
                "rate_limit: 0",
                "rate_limit: {calls: 5}",
                "rate_limit: {requests: 0}",
                "priorities: {urgent: {}}",
                "priorities: {batch: {shares: 1}}",
                "preset: fast",
                "max_batch_tokens: most",
            )
        ),
    ],
)
def test_a_typo_is_underlined(text: str) -> None:
    assert mistakes(text) != []


def test_every_key_is_explained_once() -> None:
    keys = [key for section in sections(schema()) for key in section]

    assert set(keys) == set(DESCRIPTIONS)
    assert all(str(value["description"]) for section in sections(schema()) for value in section.values())


def test_a_description_says_in_which_units() -> None:
    runtime = next(section for section in sections(schema()) if "batch_timeout" in section and "preset" in section)

    assert '"10ms"' in str(runtime["batch_timeout"]["description"])
    assert '"64MB"' in str(runtime["memory_limit"]["description"])
    assert '"' not in str(runtime["batch_size"]["description"])


def test_only_a_default_that_no_preset_and_no_type_changes_is_named() -> None:
    runtime = next(section for section in sections(schema()) if "batch_timeout" in section and "preset" in section)

    defaults = {key: value["default"] for key, value in runtime.items() if "default" in value}
    assert defaults == {"enable_cache": False, "truncate": "none", "reserved_slots": 0}
