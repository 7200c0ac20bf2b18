"""Shared by all suites."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes a test slow, not wrong.
settings.register_profile("millstream", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("millstream")

pytest.register_assert_rewrite("contracts")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first; within a file, and among the rest, the random order stays."""
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real, random embedding model of a few kilobytes: see models.py."""
    # Torch takes seconds to import; most tests need none.
    from models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
