"""The worked example of docs/custom.md: a plain torch.nn.Module in a worker process."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch_module import FEATURES, LABELS, Net
from workers import remove, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, ModelFailed
from millstream.broker.contract.job import Json
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client import Client
from millstream.worker.scheduling.memory import is_exhaustion

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture(scope="module")
def flowers(server: EmbeddedServer, net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with the example's code, and a worker that has the weights."""
    weights = tmp_path_factory.mktemp("weights") / "flowers.pt"
    torch.save(net.state_dict(), weights)
    spec = ServiceSpec(
        name=f"test-flowers-{uuid.uuid4().hex[:8]}",
        model=ModelSpec(type="custom", handler="torch_module:Flowers", device="cpu"),
        model_ref="flowers",
        runtime=Runtime(batch_size=64),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWERS_WEIGHTS", str(weights))
        with working(server.url, spec, folder=DOCS / "examples"):
            yield spec.name
    remove(server.url, spec.name)


def test_a_module_answers_as_it_does_by_itself(client: Client, flowers: str, net: Net) -> None:
    rows = torch.rand(200, FEATURES)
    with torch.inference_mode():
        chances, labels = net(rows).softmax(dim=-1).max(dim=-1)

    answers = client.submit(flowers, rows.tolist()).result()

    assert [each["label"] for each in answers] == [LABELS[label] for label in labels]  # type: ignore[index, call-overload]
    assert [each["probability"] for each in answers] == pytest.approx(chances.tolist())  # type: ignore[index, call-overload]


def test_bad_rows_fail_alone(client: Client, flowers: str) -> None:
    rows: list[Json] = [[0.1] * FEATURES for _ in range(64)]
    rows[3], rows[5] = [0.1], ["a"] * FEATURES

    outcomes = client.submit(flowers, rows).outcomes()

    assert [type(each) for each in (outcomes[3], outcomes[5])] == [InvalidRequest, ModelFailed]
    assert all(isinstance(each, dict) for row, each in enumerate(outcomes) if row not in (3, 5))


def test_what_torch_says_without_memory_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)

    assert is_exhaustion(caught.value)
    assert is_exhaustion(torch.cuda.OutOfMemoryError("CUDA"))
    # ONNX Runtime's own, which is no RuntimeError.
    assert is_exhaustion(type("RuntimeException", (Exception,), {})("Failed to allocate memory for requested buffer"))
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_exhaustion(other.value)


def test_the_page_quotes_the_example_as_it_is() -> None:
    page = (DOCS / "custom.md").read_text(encoding="utf-8")
    source = (DOCS / "examples/torch_module.py").read_text(encoding="utf-8")
    quoted = [each for each in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "torch" in each]

    assert len(quoted) == 2
    assert [each for each in quoted if each not in source] == []
