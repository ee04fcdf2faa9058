"""A right call of every operator in ``torch.ops.sensikernels``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sensikernels.layouts import BlockLayout, layout_of, to_arguments
from sensikernels.ops.group_reduce.table import GroupTable
from tests.ops.malformed.calls import floats, ints, operator
from tests.ops.malformed.damage import Base
from tests.ops.malformed.operators_rows import ROWS


def columns() -> Iterator[Base]:
    index = ints(0, 2, 3, 6, dtype=torch.int32)
    ends = {"indices": ["index"], "ascending": ["index"]}
    values = ["x:kind", "x:complex", "x:wider"]  # any dtype is moved
    yield operator(
        "gather_columns",
        x=floats(5, 8),
        index=index,
        accepts=[
            "x:longer",
            "x:shorter",
            "x:wide",
            "x:narrow",
            *values,
            "index:shorter",
            "index:empty",
        ],
        **ends,
    )
    scatter = {"x": floats(5, 4), "index": index, "width": 8}
    loose = ["x:longer", "x:shorter", "width:huge"]
    yield operator("scatter_columns", **scatter, fill=floats(8), accepts=loose, **ends)
    bare = [*loose, *values]
    yield operator(
        "scatter_columns", "scatter_columns/zero", **scatter, fill=None, accepts=bare, **ends
    )


def _linear(compact: bool) -> tuple[BlockLayout, list[int], list[Tensor]]:
    grid = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    layout = layout_of(grid, (4, 8), (12, 32), compact_input=compact, compact_output=compact)
    assert isinstance(layout, BlockLayout)
    return layout, *to_arguments(layout)


def linears() -> Iterator[Base]:
    tokens = ["x:longer", "x:shorter"]
    # Features of a compact layer that nothing names: there may be any number.
    for compact in (False, True):
        name = "/compact" if compact else ""
        spare = [f"sizes:{i}-huge" for i in (1, 2, 10, 11)] if compact else []
        layout, sizes, index = _linear(compact)
        x, dy = floats(5, layout.in_width), floats(5, layout.out_width)
        values, bias = floats(*layout.values_shape), floats(layout.out_width)
        where = {"sizes": sizes, "index": index, "backend": "native", "indices": ["index"]}
        yield operator(
            "masked_linear",
            "masked_linear" + name,
            x=x,
            values=values,
            bias=bias,
            activation="gelu",
            accepts=[*tokens, *spare],
            **where,
        )
        rows = ["dy:longer", "dy:shorter", *spare]
        yield operator(
            "masked_linear_grad_input",
            "masked_linear_grad_input" + name,
            dy=dy,
            values=values,
            accepts=rows,
            **where,
        )
        yield operator(
            "masked_linear_grad_values",
            "masked_linear_grad_values" + name,
            dy=dy,
            x=x,
            accepts=spare,
            **where,
        )
        kept = dy[:, : layout.out_width], x[:, : layout.in_width]
        yield operator(
            "selective_grad_values",
            "selective_grad_values" + name,
            dy=kept[0],
            x=kept[1],
            accepts=spare,
            **where,
        )
        yield operator(
            "selective_grad_values_grouped",
            "selective_grad_values_grouped" + name,
            dys=[kept[0], kept[0].clone()],
            x=kept[1],
            accepts=spare,
            **where | {"sizes": [*sizes, *sizes], "index": [*index, *index]},
        )
    pair = {"dy": floats(5, 12), "pre": floats(5, 12), "backend": "native"}
    yield operator("masked_linear_grad_activation", **pair)
    yield operator("selective_grad_activation", **pair)


def compact() -> Iterator[Base]:
    """Rows and columns: the grouped product alone serves them on a CPU."""
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


def selections() -> Iterator[Base]:
    tensors = [floats(3, 4), floats(5)]
    yield operator(
        "select_elements",
        tensors=tensors,
        grads=tensors,
        offsets=[0, 64],
        bytes=128,
        k=[7],
        score=2,
        backend="native",
        accepts=["k:longer"],
    )
    n = 6
    ids, kinds = ints(0, 0, 1, 1, 1, 2), ints(0, 0, 1, 1, 1, 0)
    limits = torch.tensor([4.0], dtype=torch.float64)
    columns = {
        "scores": floats(n),
        "costs": torch.ones(n),
        "segments": ids,
        "kinds": kinds,
        "minimum": [0, 0],
        "multiple": [2, 1],
        "prefix": True,
        "n_segments": 3,
        "indices": ["segments", "kinds"],
    }
    any_integer = ["segments:narrower", "kinds:narrower", "scores:wider", "costs:wider"]
    yield operator("select_units", limits=limits, mode=2, **columns, accepts=[*any_integer])
    per_segment = torch.ones(3, dtype=torch.float64)
    yield operator(
        "select_units",
        "select_units/segments",
        limits=per_segment,
        mode=0,
        **columns,
        accepts=any_integer,
    )
    cost = torch.ones(n, dtype=torch.float64)
    yield operator(
        "fill_in_order",
        cost=cost,
        segment=ids,
        free=torch.ones(n, dtype=torch.bool),
        left=torch.tensor(3.0, dtype=torch.float64),
        prefix=True,
        segments=3,
        indices=["segment"],
        accepts=["left:deeper"],
    )


def reductions() -> Iterator[Base]:
    weights = [floats(4, 6), floats(5)]
    ids = ints(0, 1, 1, -1, 0, dtype=torch.int32)
    table = GroupTable(weights, weights, groups=[("block", 2, 3), ("ids", ids, 2)])
    yield _reduction("group_reduce", table, weights)
    strided = [floats(8, 6)[::2], floats(5)]
    rows = GroupTable(strided, strided, groups="row")
    yield _reduction("group_reduce/rows", rows, strided)


def _reduction(name: str, table: GroupTable, weights: list[Tensor]) -> Base:
    groups = table.layout.groups
    arguments = {
        "weights": weights,
        "grads": weights,
        "flat": list(table.layout.flat),
        "chunks": table.chunks,
        "starts": table.starts,
        "order": table.order,
        "members": table.members,
        "host_descriptors": table.host_descriptors,
        "descriptors": None,
        "partials": table.partials(2),
        "statistics": 3,
        "running": torch.zeros(2, groups),
        "ema": torch.zeros(2, groups),
        "decay": 0.5,
        "backend": "native",
    }
    # No gradients: the weights stand in for them. A table may end early, or repeat itself.
    accepts = [
        "grads:none",
        "chunks:shorter",
        "chunks:longer",
        "members:longer",
        "partials:wide",
        "starts:0",
        *(["order", "members"] if not table.order.numel() else []),
    ]
    return operator(
        "group_reduce",
        name,
        **arguments,
        indices=["chunks", "starts", "order", "members"],
        accepts=accepts,
    )


def steps() -> Iterator[Base]:
    hyper = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.01]], dtype=torch.float64)
    shapes = {
        "all": ((4, 6), ints(dtype=torch.int32), 0, (0, 0)),
        "rows": ((2, 6), ints(0, 2, dtype=torch.int32), 1, (0, 0)),
        "columns": ((4, 3), ints(0, 2, 5, dtype=torch.int32), 2, (0, 0)),
        "blocks": ((2, 2, 3), ints(0, 3, dtype=torch.int32), 3, (2, 3)),
        "elements": ((5,), torch.tensor([0b1010001, 0b1, 0b1], dtype=torch.uint8), 4, (0, 0)),
    }
    for name, (shape, index, kind, block) in shapes.items():
        state = torch.zeros(shape)
        numbered = "indices" if kind in (1, 2, 3) else "unindexed"
        call = {
            "params": [floats(4, 6)],
            "grads": [floats(4, 6)],
            "exp_avgs": [state],
            "exp_avg_sqs": [state],
            "masters": [state.clone()],
            "steps": [torch.tensor(0.0)],
            "kept": [index],
            "kinds": [kind],
            "blocks": list(block),
            "hyper": hyper,
            "max_grad_norm": 1.0,
            "grad_scale": torch.tensor(2.0),
            "found_inf": torch.tensor(0.0),
            "masked": False,
            "backend": "native",
        }
        accepts = [
            "grads:0-wider",
            "grad_scale:wider",
            "found_inf:wider",
            "hyper:longer",
            "grad_scale:deeper",
            "found_inf:deeper",
            "steps:0-deeper",
            "masters:none",
            "masters:shorter",
            "masters:0-empty",
            *(["kept", "kinds:0-huge"] if kind == 0 else []),
            *(
                ["blocks:0-negative", "blocks:1-negative", "blocks:0-huge", "blocks:1-huge"]
                if kind != 3
                else []
            ),
        ]
        index_of = {"indices": ["kept"], "ascending": ["kept"]} if numbered == "indices" else {}
        yield operator("subset_adamw", f"subset_adamw/{name}", **call, accepts=accepts, **index_of)


MAKERS = (columns, linears, compact, *ROWS, selections, reductions, steps)
