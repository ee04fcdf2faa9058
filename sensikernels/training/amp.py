"""Mixed precision as transformers' ``fp16=True``: float32 weights, autocast, a scaled loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sensikernels._core.checks import require


class Amp:
    """Autocast and gradient scaler of one model; without a ``dtype`` neither does anything.

    ``skipped`` counts the steps left out because a gradient was not finite. They are decided on
    before the optimizer is called, so that nothing of it moves, its row clocks included.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device, self.dtype, self.skipped = device.type, dtype, 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is not None)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Forward passes of the block compute in the narrow type."""
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None):
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled."""
        (loss if self.dtype is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: Optimizer) -> bool:
        """Bring gradients back to their size; False, counted, if they overflowed."""
        if self.dtype is None:
            return True
        before = self.scaler.get_scale()
        self.scaler.unscale_(optimizer)
        self.scaler.update()
        fine = self.scaler.get_scale() >= before
        self.skipped += not fine
        return fine

    def state(self) -> dict[str, Any]:
        """The scaler's numbers, and the count."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from ``state``. Raises UsageError if it is none of this kind."""
        own, known = self.state()["scaler"], state["scaler"]
        require(
            state.keys() == {"scaler", "skipped"} and known.keys() == own.keys(), "amp", own, known
        )
        count = state["skipped"]
        require(type(count) is int and 0 <= count <= step, "skipped", f"0 to {step}", count)
        if known:
            self.scaler.load_state_dict(known)
        self.skipped = count
