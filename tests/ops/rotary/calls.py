"""Right calls of the rotary embedding, and its step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sensikernels import rotary
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import ROWS, floats, leaf, stepped


def accepted(backend: str) -> list[str]:
    """float64 where float32 angles serve it."""
    return ["x:wider"] if backend == "reference" else []


def operators() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 2, 8), "cos": floats(3, 4), "sin": floats(3, 4)}
        call = {**given, "inverse": True, "backend": backend, "accepts": accepted(backend)}
        yield operator("rotary", f"rotary/{backend}", **call)


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 2, 8), "cos": floats(3, 4), "sin": floats(3, 4)}
        call = {**given, "backend": backend, "accepts": accepted(backend)}
        yield function(f"rotary/{backend}", rotary, **call)


def launchers() -> Iterator[RightCall]:
    x, angle = floats(3, 2, 8), floats(3, 4)
    yield launcher("rotary", x=x, cos=angle, sin=angle, inverse=False, y=x)


def step(backend: str, device: str) -> list[Tensor]:
    x, angle = leaf(ROWS, 2, 32, device=device), torch.randn(ROWS, 16, device=device)
    return stepped(rotary(x, angle.cos(), angle.sin(), backend=backend), x)


STEP = Step("rotary", step)
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
