"""Texts of a random model that follow JSON Schemas, beside texts that follow none: all are valid, none is disturbed."""

from __future__ import annotations

import json
import random
from itertools import product
from typing import Any

import jsonschema
import pytest
from generating import Job, Run, load, rows_of

CONTEXT = 1_024
SCHEMAS: dict[str, Any] = {
    "object": {
        "type": "object",
        "properties": {"mill": {"enum": ["wind", "water"]}, "wheels": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["mill", "wheels"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4},
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 9},
            "corn": {"$ref": "#/$defs/corn"},
            "open": {"type": ["boolean", "null"]},
        },
        "required": ["name", "corn"],
        "additionalProperties": False,
        "$defs": {
            "corn": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"kind": {"const": "rye"}, "kg": {"type": "number", "minimum": 0, "maximum": 9.5}},
                    "required": ["kg"],
                    "additionalProperties": False,
                },
                "maxItems": 2,
            }
        },
    },
    "choice": {
        "anyOf": [
            {"type": "string", "pattern": "^[a-z]{3}-[0-9]{2}$"},
            {"type": "string", "format": "date"},
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
        ]
    },
    "map": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,4}$": {"type": "string", "maxLength": 5}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
}
TEXTS = 20
"""Texts of each schema."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import language_models

    folder = tmp_path_factory.mktemp("language-model") / "grouped"
    return load(language_models.save_language_model(folder, "grouped", context=CONTEXT))


def test_100_sampled_texts_are_valid_by_their_schemas_and_do_not_change_their_neighbours(model: Any) -> None:
    rng = random.Random(19)
    neighbours = [Job.random(rng, tokens=20, most=100) for _ in range(8)]
    options = {"temperature": 1.0, "seed": 5, "ignore_eos": True}
    alone = Run(model, slots=4).until_done(rows_of(model, neighbours, options), rng)
    rows: dict[str, Any] = {}
    for kind, seed in product(SCHEMAS, range(TEXTS)):
        form = {"response_format": {"type": "json_schema", "schema": SCHEMAS[kind]}, "temperature": 1.0, "seed": seed}
        (row,) = rows_of(model, [Job.random(rng, tokens=20, most=CONTEXT - 20)], form)
        row.owner = f"{kind} {seed}"
        rows[row.owner] = row
    run = Run(model, slots=16, cache_tokens=16 * CONTEXT)

    outcomes = run.until_done([*rows.values(), *rows_of(model, neighbours, options)], rng)

    texts: dict[str, set[str]] = {kind: set() for kind in SCHEMAS}
    for name in rows:
        kind, outcome = name.split()[0], outcomes.pop(name)
        assert outcome["finish_reason"] == "stop", name
        jsonschema.validate(json.loads(outcome["text"]), SCHEMAS[kind], format_checker=jsonschema.FormatChecker())
        texts[kind].add(outcome["text"])
    assert len(rows) == 100
    assert min(len(each) for each in texts.values()) > TEXTS // 2
    assert outcomes == alone
    assert run.engine.blocks_in_use == 0
