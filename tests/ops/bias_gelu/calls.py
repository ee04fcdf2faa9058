"""Right calls of bias and GELU, and their step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sensikernels import bias_gelu
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import IN, ROWS, floats, leaf, stepped


def accepted(backend: str) -> list[str]:
    """Tokens there may be any number of; the bias comes in a dtype of its own."""
    wide = ["x:wider"] if backend == "reference" else []
    return ["x:longer", "x:shorter", "x:deeper", "bias:wider", *wide]


def operators() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 8), "bias": floats(8), "backend": backend}
        name = f"bias_gelu/{backend}"
        yield operator("bias_gelu", name, **given, accepts=accepted(backend))
        back = {**given, "dy": floats(3, 8), "bias_needed": True, "accepts": ["bias:wider"]}
        yield operator("bias_gelu_backward", f"bias_gelu_backward/{backend}", **back)


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {"x": floats(3, 8), "bias": floats(8), "backend": backend}
        yield function(f"bias_gelu/{backend}", bias_gelu, **given, accepts=accepted(backend))


def launchers() -> Iterator[RightCall]:
    x = floats(3, 8)
    yield launcher("bias_gelu", x=x, bias=floats(8), y=x)
    yield launcher("bias_gelu_backward", dy=x, x=x, bias=floats(8), dx=x, dbias=floats(8))


def step(backend: str, device: str) -> list[Tensor]:
    x, bias = leaf(ROWS, IN, device=device), leaf(IN, device=device)
    return stepped(bias_gelu(x, bias, backend=backend), x, bias)


STEP = Step("bias_gelu", step)
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
