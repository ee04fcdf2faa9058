"""Right calls of dropout, sum and normalization, and their step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sensikernels import dropout_add_norm
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import IN, ROWS, affine, drops, floats, leaf, normalization, stepped

WIDE = ["weight:wider", "bias:wider"]


def operators() -> Iterator[RightCall]:
    x = floats(3, 8)
    for backend in BACKENDS:
        run = {**affine(), **drops(), "backend": backend}
        name = f"dropout_add_norm/{backend}"
        given = {"x": x, "residual": x, "eps": 1e-12, "save": True}
        yield operator("dropout_add_norm", name, **given, **run, accepts=WIDE)
        saved = {"dy": x, "before": x, "moments": floats(3, 2), "affine_needed": True}
        name, accepts = f"dropout_add_norm_backward/{backend}", [*WIDE, "dy:deeper"]
        yield operator("dropout_add_norm_backward", name, **saved, **run, accepts=accepts)


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 8), "residual": floats(3, 8), **normalization(), "recover": "auto"}
        run = {**given, "backend": backend, "accepts": WIDE}
        yield function(f"dropout_add_norm/{backend}", dropout_add_norm, **run)


def launchers() -> Iterator[RightCall]:
    x, both = floats(3, 8), {"moments": floats(3, 2), **affine(), **drops()}
    outputs = {"y": x, "sum": x}
    yield launcher("dropout_add_norm", x=x, residual=x, eps=1e-12, **both, **outputs)
    grads = {"dx": x, "dresidual": x, "daffine": floats(2, 8)}
    yield launcher("dropout_add_norm_backward", dy=x, before=x, **both, **grads)
    yield launcher("dropout_add_norm_recovers", **affine())


def step(backend: str, device: str) -> list[Tensor]:
    x, residual = (leaf(ROWS, IN, device=device) for _ in range(2))
    leaves = (x, residual, *(leaf(IN, device=device) for _ in range(2)))
    draw = torch.tensor(5, device=device)
    return stepped(dropout_add_norm(*leaves, dropout=0.2, seed=draw, backend=backend), *leaves)


STEP = Step("dropout_add_norm", step)
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
