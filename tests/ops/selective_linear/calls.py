"""Right calls of the selective linear, and its step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from sensikernels import SelectiveLinear, selective_linear
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, operator
from tests.ops.common.calls import blocks, linear, linear_step, of_blocks
from tests.ops.inputs import floats, ints


def operators() -> Iterator[RightCall]:
    for of in of_blocks():
        x, dy = floats(5, of.layout.in_width), floats(5, of.layout.out_width)
        where = {**of.where, "x": x, "accepts": of.spare}
        name = "selective_grad_values"
        yield operator(name, name + of.suffix, **where, dy=dy)
        twice = {k: [*where[k], *where[k]] for k in ("sizes", "index")}
        grouped = "selective_grad_values_grouped"
        yield operator(grouped, grouped + of.suffix, **where | twice, dys=[dy, dy.clone()])
    pair = {"dy": floats(5, 12), "pre": floats(5, 12), "backend": "native"}
    yield operator("selective_grad_activation", **pair)
    # Rows and columns: the grouped product alone serves them on a CPU.
    rows, columns = ints(0, 2, 5, dtype=torch.int32), ints(1, 2, 7, dtype=torch.int32)
    yield operator(
        "selective_grad_values_grouped",
        "selective_grad_values_grouped/compact",
        dys=[floats(5, 3)],
        x=floats(5, 3),
        sizes=[9, 6, 8, 0, 0, 1, 1],
        index=[rows, columns],
        backend="native",
        indices=["index"],
        ascending=["index"],
        accepts=["sizes:1-huge", "sizes:2-huge"],
    )


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        given = {**linear(blocks()), "weight": floats(12, 32), "backend": backend}
        given["values"].requires_grad_()
        yield function(f"selective_linear/{backend}", selective_linear, **given)


STEP = Step("selective_linear", partial(linear_step, SelectiveLinear))
CALLS = Calls(operators=operators, functions=functions, steps=(STEP,))
