"""Lets a model be loaded in one thread while another one runs forwards of other models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

Turn = Callable[[], AbstractContextManager[None]]
"""Gives the device to the calling thread, between two forwards of other models."""


@contextmanager
def beside_forwards(turn: Turn) -> Iterator[None]:
    """Keeps forwards of other threads away while this thread has changed torch's default dtype.

    transformers sets it while it makes the modules of a model whose weights are no float32. It holds for all threads,
    and forwards make tensors by it.
    """
    own, loader = torch.set_default_dtype, threading.get_ident()
    usual = torch.get_default_dtype()
    with ExitStack() as held:

        def set_default_dtype(dtype: torch.dtype) -> None:
            if threading.get_ident() != loader:
                own(dtype)
            elif dtype == usual:
                own(dtype)
                held.close()
            else:
                if torch.get_default_dtype() == usual:
                    held.enter_context(turn())
                own(dtype)

        torch.set_default_dtype = set_default_dtype
        try:
            yield
        finally:
            torch.set_default_dtype = own
            own(usual)
