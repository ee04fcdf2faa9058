"""Right calls of what operators share: columns, layouts, products of blocks; parts of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels import Mask
from sensikernels.layouts import BlockLayout, CompactLayout, layout_of, to_arguments
from sensikernels.ops.masked_linear import masked_linear
from tests.ops.calls import BACKENDS, Calls, RightCall, function, launcher, operator
from tests.ops.inputs import IN, OUT, ROWS, floats, ints, leaf, stepped


def blocks(compact: bool = False) -> BlockLayout:
    """Three rows of four blocks, the middle row empty."""
    grid = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    layout = layout_of(grid, (4, 8), (12, 32), compact_input=compact, compact_output=compact)
    assert isinstance(layout, BlockLayout)
    return layout


@dataclass(frozen=True)
class Blocks:
    """A layout of blocks as an operator is given it, and what may then be damaged."""

    suffix: str
    layout: BlockLayout
    where: dict[str, Any]
    spare: list[str]
    """Features of a compact layer that nothing names: there may be any number."""


def of_blocks() -> Iterator[Blocks]:
    """The layout, whole and compact."""
    yield Blocks("", blocks(), _where(blocks()), [])
    layout, spare = blocks(compact=True), [f"sizes:{i}-huge" for i in (1, 2, 10, 11)]
    yield Blocks("/compact", layout, _where(layout), spare)


def _where(layout: BlockLayout) -> dict[str, Any]:
    sizes, index = to_arguments(layout)
    return {"sizes": sizes, "index": index, "backend": "native", "indices": ["index"]}


def linear(layout: BlockLayout) -> dict[str, Any]:
    """Arguments and the like that the functions of masked and selective linears share."""
    tokens = ["x:longer", "x:shorter", "x:deeper"]
    given = {"x": floats(5, 32), "layout": layout, "bias": floats(12), "activation": "gelu"}
    return {**given, "values": floats(*layout.values_shape), "accepts": tokens}


def linear_step(kind: Any, backend: str, device: str) -> list[Tensor]:
    """A layer of ``kind`` and so its op, by rows and by blocks."""
    grid = torch.arange(6).view(3, 2) % 3 != 1
    rows = Mask.rows(torch.arange(OUT) % 3 == 0, (OUT, IN))
    found = []
    for mask in (rows, Mask.blocks(grid, (32, 32), (OUT, IN))):
        x, dense = leaf(ROWS, IN, device=device), nn.Linear(IN, OUT).to(device)
        layer = kind.from_linear(dense, mask, backend=backend)
        found += stepped(layer(x), x, *layer.parameters())
    return found


def operators() -> Iterator[RightCall]:
    index = ints(0, 2, 3, 6, dtype=torch.int32)
    ends = {"indices": ["index"], "ascending": ["index"]}
    values = ["x:kind", "x:complex", "x:wider"]  # any dtype is moved
    shapes = ["x:longer", "x:shorter", "x:wide", "x:narrow", "index:shorter", "index:empty"]
    accepts = [*shapes, *values]
    yield operator("gather_columns", x=floats(5, 8), index=index, accepts=accepts, **ends)
    scatter = {"x": floats(5, 4), "index": index, "width": 8}
    loose = ["x:longer", "x:shorter", "width:huge"]
    yield operator("scatter_columns", **scatter, fill=floats(8), accepts=loose, **ends)
    bare = [*loose, *values]
    yield operator(
        "scatter_columns", "scatter_columns/zero", **scatter, fill=None, accepts=bare, **ends
    )


def functions() -> Iterator[RightCall]:
    def compact(rows: Tensor, columns: Tensor, backend: str) -> Tensor:
        layout = CompactLayout(shape=(12, 32), rows=rows, columns=columns)
        return masked_linear(floats(5, 32), floats(3, 4), layout, backend=backend)

    for backend in BACKENDS:
        yield function(
            f"CompactLayout/{backend}",
            compact,
            rows=ints(0, 2, 11, dtype=torch.int32),
            backend=backend,
            columns=ints(1, 2, 7, 31, dtype=torch.int32),
            indices=["rows", "columns"],
            ascending=["rows", "columns"],
        )


def launchers() -> Iterator[RightCall]:
    one = blocks()
    for tokens in (3, 20):  # few are read as they lie, more by panels
        x, dy, values = floats(tokens, 32), floats(tokens, 12), floats(*one.values_shape)
        rows = {"row_ptr": one.row_ptr, "col_idx": one.col_idx}
        yield launcher("block_forward", x=x, values=values, **rows, bias=floats(12), out_width=12)
        columns = {name: getattr(one, name) for name in ("row_ptr_t", "row_idx_t", "perm_t")}
        yield launcher("block_grad_input", dy=dy, values=values, **columns, in_width=32)
    yield launcher(
        "block_grad_values", dys=[dy], x=x, row_idx=[one.row_idx], col_idx=[one.col_idx], bm=4, bn=8
    )
    index = ints(0, 2, 3, 6, dtype=torch.int32)
    yield launcher("gather_columns", x=floats(5, 8), index=index)
    yield launcher("scatter_columns", x=floats(5, 4), index=index, width=8, fill=floats(8))
    yield launcher("scatter_biased", x=floats(5, 4), index=index, bias=floats(8))
    yield launcher("first_outside", index=index, low=0, high=8, ascending=True)
    yield launcher("read_all", words=ints(1, 2, 3))


CALLS = Calls(operators=operators, functions=functions, launchers=launchers)
