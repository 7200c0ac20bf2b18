"""docs/tuning.md says what presets and types of models set, and nothing else does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from millstream.broker.config.spec import PRESETS, Runtime
from millstream.broker.contract.operations import OPERATIONS

PAGE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")


def table(first: str) -> dict[str, dict[str, str]]:
    """The table whose first heading is `first`: what each row's first cell names -> its other cells by heading."""
    heading, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(rf"^\| {first} .*\n(?:\|.*\n)+", PAGE, re.MULTILINE)[0].splitlines()
    ]
    found = {}
    for names, *cells in rows:
        found.update({name: dict(zip(heading[1:], cells, strict=True)) for name in names.split(", ")})
    return found


@pytest.mark.parametrize("model_type", OPERATIONS)
def test_the_page_has_what_each_type_of_model_sets(model_type: str) -> None:
    runtime = Runtime.model_validate(OPERATIONS[model_type].defaults)

    shown = dict(table("type")[model_type])

    calls = runtime.rate_limit.requests if runtime.rate_limit else None
    assert shown.pop("rate_limit") == (f"{calls:g} calls/s" if calls else "none")
    assert Runtime.model_validate(shown) == runtime.model_copy(update={"rate_limit": None})
    assert set(OPERATIONS[model_type].defaults) <= {*shown, "rate_limit"}


def test_the_page_has_what_each_preset_sets() -> None:
    shown = {name: {key: row[key] for key in PRESETS[name]} for name, row in table("preset").items()}

    assert {name: Runtime.model_validate(each) for name, each in shown.items()} == {
        name: Runtime.model_validate(each) for name, each in PRESETS.items()
    }
