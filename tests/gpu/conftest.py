"""Fixtures of the GPU tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@pytest.fixture
def no_host_sync() -> Callable[[], AbstractContextManager[None]]:
    """A block in which waiting for the device raises."""

    @contextmanager
    def block() -> Iterator[None]:
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.synchronize()

    return block
