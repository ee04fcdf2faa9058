"""Right calls of the gated GELU, and its step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sensikernels import geglu
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import IN, ROWS, floats, leaf, stepped


def accepted(backend: str) -> list[str]:
    """Tokens there may be any number of; the bias comes in a dtype of its own."""
    wide = ["x:wider"] if backend == "reference" else []
    return ["x:longer", "x:shorter", "x:deeper", "bias:wider", *wide]


def operators() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 8), "bias": floats(8), "backend": backend}
        yield operator("geglu", f"geglu/{backend}", **given, accepts=accepted(backend))
        back = {**given, "dy": floats(3, 4), "bias_needed": True, "accepts": ["bias:wider"]}
        yield operator("geglu_backward", f"geglu_backward/{backend}", **back)


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 8), "bias": floats(8), "backend": backend}
        yield function(f"geglu/{backend}", geglu, **given, accepts=accepted(backend))


def launchers() -> Iterator[RightCall]:
    x, y = floats(3, 8), floats(3, 4)
    yield launcher("geglu", x=x, bias=floats(8), y=y)
    yield launcher("geglu_backward", dy=y, x=x, bias=floats(8), dx=x, dbias=floats(8))


def step(backend: str, device: str) -> list[Tensor]:
    x, bias = leaf(ROWS, IN, device=device), leaf(IN, device=device)
    return stepped(geglu(x, bias, backend=backend), x, bias)


STEP = Step("geglu", step)
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
