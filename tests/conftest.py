"""Shared by all suites."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("contracts")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real, random embedding model of a few kilobytes: see models.py."""
    # Torch takes seconds to import; most tests need none.
    from models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
