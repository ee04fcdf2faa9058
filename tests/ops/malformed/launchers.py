"""A right call of the private launchers in ``torch.ops.sensikernels_native``.

None may end the process. What they do not refuse may be a call of another meaning: the operators
above them check that. Left out are the two whose tables hold addresses, which none can look behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sensikernels._core import extension
from sensikernels.layouts import BlockLayout, layout_of
from tests.ops.malformed.calls import floats, ints, seed
from tests.ops.malformed.damage import Base

BY_ADDRESS = ("group_reduce", "subset_adamw_step")


def launcher(name: str, **arguments: Any) -> Base:
    indices = tuple(
        k
        for k, v in arguments.items()
        if isinstance(v, torch.Tensor | list) and k not in ("seed", "minimum", "multiple")
    )
    call = getattr(extension.ops(), name)
    return Base(name=name, call=call, arguments=arguments, indices=indices, ascending=indices)


def elementwise() -> Iterator[Base]:
    x, drops = floats(3, 8), {"seed": seed(), "threshold": 40000}
    yield launcher("dropout", x=x, **drops, y=x)
    yield launcher("bias_gelu", x=x, bias=floats(8), y=x)
    yield launcher("bias_gelu_backward", dy=x, x=x, bias=floats(8), dx=x, dbias=floats(8))
    affine = {"weight": floats(8), "bias": floats(8)}
    yield launcher(
        "dropout_add_norm",
        x=x,
        residual=x,
        **affine,
        **drops,
        eps=1e-12,
        y=x,
        sum=x,
        moments=floats(3, 2),
    )
    yield launcher(
        "dropout_add_norm_backward",
        dy=x,
        before=x,
        moments=floats(3, 2),
        **affine,
        **drops,
        dx=x,
        dresidual=x,
        daffine=floats(2, 8),
    )
    yield launcher("dropout_add_norm_recovers", **affine)
    ids = {"id0": ints(0, 4, 1), "id1": ints(0, 1, 2), "id2": ints(0, 1, 0)}
    tables = {"table0": floats(5, 8), "table1": floats(3, 8), "table2": floats(2, 8)}
    yield launcher(
        "embed_norm", **ids, **tables, **affine, **drops, eps=1e-12, y=x, moments=floats(3, 2)
    )
    yield launcher(
        "embed_norm_backward",
        dy=x,
        **ids,
        **tables,
        moments=floats(3, 2),
        weight=floats(8),
        **drops,
        dsum=x,
        daffine=floats(2, 8),
    )
    yield launcher("add_rows", rows=x, index=ints(0, 4, 1), out=torch.zeros(5, 8))
    loss = {"labels": ints(0, -100, 4), "stats": torch.ones(3, 2), "scale": torch.ones(())}
    logits = floats(3, 5)
    yield launcher("cross_entropy", logits=logits, ignored=-100, loss=torch.ones(()), **loss)
    yield launcher(
        "cross_entropy_backward",
        dloss=torch.ones(()),
        logits=logits,
        ignored=-100,
        dlogits=logits,
        **loss,
    )


def attention() -> Iterator[Base]:
    cu = ints(0, 3, 5, dtype=torch.int32)
    q, v = floats(5, 2, 4), floats(5, 2, 3)
    call = {
        "query": q,
        "key": q,
        "value": v,
        "cu_seqlens_query": cu,
        "cu_seqlens": cu,
        "seed": seed(),
        "threshold": 40000,
        "scale": 0.5,
        "pairs": True,
    }
    yield launcher("varlen_attention", **call, out=v, logsumexp=floats(2, 5))
    yield launcher("varlen_attention_backward", dout=v, **call, dq=q, dk=q, dv=v)
    yield launcher(
        "varlen_attention_drop", p=floats(2, 2, 3, 3), starts=cu[:2], seed=seed(), threshold=40000
    )


def products() -> Iterator[Base]:
    grid = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    one = layout_of(grid, (4, 8), (12, 32))
    assert isinstance(one, BlockLayout)
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


def selections() -> Iterator[Base]:
    n = 6
    tensors = [floats(3, 4), floats(5)]
    yield launcher(
        "select_elements",
        tensors=tensors,
        grads=tensors,
        offsets=[0, 64],
        k=[7],
        score=2,
        arena=torch.zeros(128, dtype=torch.uint8),
        threshold=floats(1),
        counts=ints(0, 0),
    )
    empty = {
        "bits": torch.zeros(n, dtype=torch.bool),
        "indices": torch.zeros(n, dtype=torch.int32),
        "counts": torch.zeros(3, dtype=torch.int32),
    }
    yield launcher(
        "select_units",
        scores=floats(n).double(),
        costs=torch.ones(n).double(),
        segments=ints(0, 0, 1, 1, 1, 2),
        kinds=ints(0, 0, 1, 1, 1, 0),
        limits=torch.tensor([4.0]).double(),
        mode=2,
        minimum=[0, 0],
        multiple=[2, 1],
        prefix=True,
        **empty,
    )
    yield launcher(
        "select_chain",
        value=torch.rand(n).double(),
        own=ints(1, 2, 3, 1, 2, 3),
        passed=ints(6, 5, 4, 3, 2, 1),
        bins=20,
    )
    yield launcher("subset_adamw_coalesce", rows=ints(0, 3, 1), values=floats(3, 4))
    yield launcher("read_all", words=ints(1, 2, 3))


MAKERS = (elementwise, attention, products, selections)
