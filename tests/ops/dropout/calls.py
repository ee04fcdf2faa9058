"""Right calls of dropout, and its step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sensikernels import dropout
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import IN, ROWS, drops, floats, leaf, seed, stepped

SHAPES = ("empty", "deeper", "flatter", "longer", "shorter", "wide", "narrow")


def accepted(backend: str) -> list[str]:
    """Any shape."""
    return [f"x:{how}" for how in (*SHAPES, *(["wider"] if backend == "reference" else []))]


def operators() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 8), **drops(), "backend": backend}
        yield operator("dropout", f"dropout/{backend}", **given, accepts=accepted(backend))


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 8), "p": 0.3, "seed": seed(), "backend": backend}
        yield function(f"dropout/{backend}", dropout, **given, accepts=accepted(backend))


def launchers() -> Iterator[RightCall]:
    x = floats(3, 8)
    yield launcher("dropout", x=x, **drops(), y=x)


def step(backend: str, device: str) -> list[Tensor]:
    x, draw = leaf(ROWS, IN, device=device), torch.tensor(5, device=device)
    return stepped(dropout(x, 0.3, seed=draw, backend=backend), x)


STEP = Step("dropout", step)
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
