"""A matrix is multiplied by oneDNN only if that is faster and gives the same."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from millstream.worker.generation import matrices
from millstream.worker.generation.matrices import Matrix, Product, pack_faster

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def layers(*sizes: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    return [nn.Linear(24, size, bias=bias, dtype=dtype) for size in sizes]


def ratio(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(matrices, "_time_ratio", lambda *_: value)


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("ways", ["torch", "oneDNN"])
@torch.inference_mode()
def test_products_are_those_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, ways: str
) -> None:
    ratio(monkeypatch, 0.5 if ways == "oneDNN" else 2.0)
    parts = layers(8, 16, bias=bias, dtype=dtype)
    rows, sums = torch.randn(5, 24, dtype=dtype), torch.randn(5, 24, dtype=dtype)
    expected = torch.cat([each(rows) for each in parts], dim=-1)
    matrix = Matrix(*parts)

    assert pack_faster([matrix], 5) == (ways == "oneDNN")

    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(matrix.of(rows), expected, atol=close)
    assert torch.allclose(matrix.added(sums.clone(), rows), sums + expected, atol=2 * close)


@DTYPES
def test_unpacking_restores_the_layers_weights(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    ratio(monkeypatch, 0.5)
    parts = layers(8, 16, dtype=dtype)
    before = [each.weight.detach().clone() for each in parts]
    matrix = Matrix(*parts)
    pack_faster([matrix], 5)
    assert [each.weight.numel() for each in parts] == [0, 0]

    matrix.unpack()

    assert all(torch.equal(each.weight, weight) for each, weight in zip(parts, before, strict=True))


def test_a_shared_weight_stays_beside_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio(monkeypatch, 0.5)
    (layer,) = layers(8)
    before = layer.weight.detach().clone()

    assert pack_faster([Matrix(layer, shared=True)], 5) == 1

    assert torch.equal(layer.weight, before)


def test_a_product_that_is_not_faster_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio(monkeypatch, 0.95)

    assert pack_faster([Matrix(*layers(8))], 5) == 0


@pytest.mark.parametrize("fault", ["of", "added"])
def test_a_product_that_differs_stays_with_torch(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    ratio(monkeypatch, 0.5)
    onednns = matrices.onednns

    def wrong(packed: torch.Tensor, bias: torch.Tensor | None) -> Product:
        product = onednns(packed, bias)
        if fault == "of":
            return product._replace(of=lambda rows: 1.001 * product.of(rows))
        return product._replace(added=lambda sums, rows: 1.001 * product.added(sums, rows))

    monkeypatch.setattr(matrices, "onednns", wrong)

    assert pack_faster([Matrix(*layers(8))], 5) == 0


def test_other_dtypes_stay_with_torch() -> None:
    assert pack_faster([Matrix(*layers(8, dtype=torch.float64))], 5) == 0


def test_an_operator_that_fails_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def renamed(*_: object) -> Product:
        raise AttributeError("no such operator")

    monkeypatch.setattr(matrices, "onednns", renamed)
    (layer,) = layers(8)

    with caplog.at_level(logging.WARNING):
        assert pack_faster([Matrix(layer)], 5) == 0

    assert "no such operator" in caplog.text
    assert layer.weight.numel()


def test_both_ways_are_timed_on_the_matrices_themselves() -> None:
    assert 0.01 < matrices._time_ratio([Matrix(*layers(8)), Matrix(*layers(8))], 5) < 100
