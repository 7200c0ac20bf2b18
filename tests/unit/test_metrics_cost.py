"""The benchmark of counting compares the product with one that counts nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import metrics_cost
import pytest


@pytest.mark.parametrize(("name", "found", "instead"), metrics_cost.CUTS)
def test_what_is_taken_out_stands_once_in_its_file(name: str, found: str, instead: str) -> None:
    text = (metrics_cost.ROOT / name).read_text(encoding="utf-8")

    assert text.count(found) == 1
    assert found != instead


def test_a_copy_runs_its_own_code(tmp_path: Path) -> None:
    checkout = metrics_cost.copied(tmp_path / "copy", metrics_cost.CUTS)

    command = [checkout.command("python"), "-c", "import millstream.client as c; print(c.__file__)"]
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).resolve().is_relative_to(checkout.path)
