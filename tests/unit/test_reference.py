"""docs/reference is what scripts/reference.py makes of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
assert SPEC
assert SPEC.loader
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_page_of_the_reference_is_up_to_date(page: str) -> None:
    made = reference.PAGES[page]()

    assert (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8") == made, "run scripts/reference.py"


def test_every_key_of_a_service_is_explained() -> None:
    text = reference.configuration_page()

    for part in ("", ".runtime", ".runtime.priorities.NAME"):
        assert f"\n## services.NAME{part}\n" in text
    assert "| `reserved_slots` | whole number of at least 0 | `0` |" in text
