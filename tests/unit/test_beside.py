"""A model is loaded in one thread while another one runs forwards: torch's default dtype holds for both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from millstream.worker.models.loading.beside import beside_forwards


class Turns:
    """A device that notes who has it."""

    def __init__(self) -> None:
        self.taken = self.left = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.taken += 1
        try:
            yield
        finally:
            self.left += 1


def test_a_load_has_the_device_while_the_default_dtype_is_another_one() -> None:
    turns = Turns()
    with beside_forwards(turns.turn):
        assert turns.taken == 0
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_dtype(torch.float16)
        assert (turns.taken, turns.left, torch.get_default_dtype()) == (1, 0, torch.float16)
        torch.set_default_dtype(torch.float32)
        assert (turns.taken, turns.left, torch.get_default_dtype()) == (1, 1, torch.float32)
        torch.set_default_dtype(torch.float32)

    assert (turns.taken, turns.left) == (1, 1)


def _fail_beside(turns: Turns) -> None:
    with beside_forwards(turns.turn):
        torch.set_default_dtype(torch.bfloat16)
        raise ValueError("broken")


def test_a_load_that_fails_leaves_the_device_and_the_dtype_as_they_were() -> None:
    turns, own = Turns(), torch.set_default_dtype
    with pytest.raises(ValueError, match="broken"):
        _fail_beside(turns)

    assert (turns.taken, turns.left, torch.get_default_dtype()) == (1, 1, torch.float32)
    assert torch.set_default_dtype is own


def test_other_threads_set_the_default_dtype_as_always() -> None:
    turns = Turns()
    with beside_forwards(turns.turn):
        other = threading.Thread(target=torch.set_default_dtype, args=(torch.float64,))
        other.start()
        other.join()
        assert (turns.taken, torch.get_default_dtype()) == (0, torch.float64)

    assert torch.get_default_dtype() == torch.float32
