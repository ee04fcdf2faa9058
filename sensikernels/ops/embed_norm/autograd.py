"""The derivative: saves ids, tables and two numbers a token; sum and mask are made again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.embed_norm import ops

_OPS = torch.ops.sensikernels


class EmbedNorm(torch.autograd.Function):
    """Once differentiable; the reference is differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """``arguments``: three ids, three tables, weight, bias, and what is not differentiated."""
        ids, tables, (weight, bias) = arguments[:3], arguments[3:6], arguments[6:8]
        seed, threshold, eps, sparse, backend = arguments[8:]
        run = ops.forward if unwatched(tables[0]) else _OPS.embed_norm
        y, moments = run(ids, tables, weight, bias, seed, threshold, eps, backend)
        ctx.save_for_backward(*ids, *tables, moments, weight, seed)
        ctx.threshold, ctx.sparse, ctx.backend = threshold, sparse, backend
        ctx.bias_dtype = bias.dtype
        out: Tensor = y
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, moments, weight, seed = ctx.saved_tensors
        ids, tables, needed = list(saved[:3]), list(saved[3:]), ctx.needs_input_grad
        plain = unwatched(dy)
        run = ops.backward if plain else _OPS.embed_norm_backward
        add_rows = ops.add_rows if plain else _OPS.add_rows
        drop, affine_needed = (seed, ctx.threshold), needed[6] or needed[7]
        call = (ids, tables, moments, weight, *drop, affine_needed, ctx.backend)
        dsum, daffine = run(dy, *call)
        grads: list[Tensor | None] = [None] * 3
        for n, (index, table) in enumerate(zip(ids, tables, strict=True)):
            if not needed[3 + n]:
                continue
            if n == 0 and ctx.sparse:
                grads[0] = torch.sparse_coo_tensor(
                    index.reshape(1, -1), dsum, table.shape, check_invariants=False
                )
            else:
                grads[n] = add_rows(dsum, index, table.shape[0], ctx.backend)
        dweight = daffine[0].to(weight.dtype) if needed[6] else None
        dbias = daffine[1].to(ctx.bias_dtype) if needed[7] else None
        return (*[None] * 3, *grads, dweight, dbias, *[None] * 5)
