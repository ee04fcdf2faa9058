"""The time of a call, the device idle before and after."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def elapsed_ms(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def synchronize(device: torch.device | str) -> None:
    """Wait for ``device``; a CPU has nothing to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
