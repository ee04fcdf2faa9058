"""Right calls of the masked linear, and its step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sensikernels import MaskedLinear, masked_linear
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, operator
from tests.ops.common.calls import blocks, linear, linear_step, of_blocks
from tests.ops.inputs import floats


def operators() -> Iterator[RightCall]:
    tokens = ["x:longer", "x:shorter"]
    for of in of_blocks():
        layout, name = of.layout, "masked_linear" + of.suffix
        x, dy = floats(5, layout.in_width), floats(5, layout.out_width)
        values, bias = floats(*layout.values_shape), floats(layout.out_width)
        given = {"x": x, "values": values, "bias": bias, "activation": "gelu"}
        yield operator("masked_linear", name, **given, accepts=[*tokens, *of.spare], **of.where)
        yield operator(
            "masked_linear_grad_input",
            "masked_linear_grad_input" + of.suffix,
            dy=dy,
            values=values,
            accepts=["dy:longer", "dy:shorter", *of.spare],
            **of.where,
        )
        yield operator(
            "masked_linear_grad_values",
            "masked_linear_grad_values" + of.suffix,
            dy=dy,
            x=x,
            accepts=of.spare,
            **of.where,
        )
    pair = {"dy": floats(5, 12), "pre": floats(5, 12), "backend": "native"}
    yield operator("masked_linear_grad_activation", **pair)


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = linear(blocks())
        yield function(f"masked_linear/{backend}", masked_linear, **given, backend=backend)


STEP = Step("masked_linear", partial(linear_step, MaskedLinear))
CALLS = Calls(operators=operators, functions=functions, steps=(STEP,))
