"""The embeddings and one layer on packed tokens: HuggingFace's modules in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels._core.hooks import bare
from sensikernels.hf.family import Block, Closing, Embedding, GatedBlock
from sensikernels.hf.packed.joined import plain, project
from sensikernels.hf.packed.pieces import attend, is_exact_gelu, uncalled
from sensikernels.hf.packed.prenorm import run_gated
from sensikernels.hf.packed.tokens import Tokens
from sensikernels.nn import CounterDropout
from sensikernels.ops.bias_gelu import bias_gelu
from sensikernels.ops.dropout_add_norm import dropout_add_norm
from sensikernels.ops.embed_norm import embed_norm


def embed(embedding: Embedding, tokens: Tokens, *, fused: bool) -> Tensor:
    """Hidden states ``[tokens, hidden]`` of the embedding block."""
    for module in embedding.around:
        uncalled(module)
    hidden = (
        _fused_sum(embedding, tokens) if fused and _can_fuse(embedding) else _sum(embedding, tokens)
    )
    return hidden if embedding.project is None else embedding.project(hidden)


def _can_fuse(embedding: Embedding) -> bool:
    return (
        _has_weight(embedding.norm)
        and all(table is None or _is_table(table) for table in embedding.tables)
        and _is_dropout(embedding.dropout)
    )


def _fused_sum(embedding: Embedding, tokens: Tokens) -> Tensor:
    words, *others = embedding.tables
    # One row of zeros where a table is absent: exact, and as fast as an operator of its own.
    tables = [
        words.weight.new_zeros(1, words.weight.shape[1])
        if table is None
        else without_row(table.weight, table.padding_idx)
        for table in embedding.tables
    ]
    rows = (tokens.position_ids, tokens.token_type_ids)
    positions, types = (
        torch.zeros_like(ids) if table is None else ids
        for table, ids in zip(others, rows, strict=True)
    )
    norm = embedding.norm
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return embed_norm(
        tokens.input_ids,
        positions,
        types,
        *(*tables, norm.weight, bias),
        dropout=_rate(embedding.dropout),
        eps=norm.eps,
        sparse=words.sparse,
    )


def _sum(embedding: Embedding, tokens: Tokens) -> Tensor:
    words, positions, types = embedding.tables
    total = words(tokens.input_ids)
    if types is not None:
        total = total + types(tokens.token_type_ids)
    if positions is not None:
        total = total + positions(tokens.position_ids)
    hidden: Tensor = embedding.dropout(embedding.norm(total))
    return hidden


def run_layer(
    block_of: Callable[[Any], Block | GatedBlock],
    layer: Any,
    hidden: Tensor,
    tokens: Tokens,
    *,
    fused: bool,
    first_only: bool = False,
) -> Tensor:
    """One layer on ``[tokens, hidden]``: the same shape, or ``[rows, hidden]`` with ``first_only``.

    ``block_of``: the modules of ``layer``. ``first_only``: queries, output projection and FFN for
    each sequence's first token alone.
    """
    block = block_of(layer)
    for module in block.around:
        uncalled(module)
    if isinstance(block, GatedBlock):
        return run_gated(block, hidden, tokens, fused=fused, first_only=first_only)
    residual = hidden.index_select(0, tokens.first) if first_only else hidden
    context = _attend(block, hidden, residual, tokens, fused=fused, first_only=first_only)
    hidden = _close(block.attended, context, residual, fused=fused)
    inner = _activate(block.intermediate, block.activation, hidden, fused=fused)
    return _close(block.output, inner, hidden, fused=fused)


def _attend(
    block: Block, hidden: Tensor, asking: Tensor, tokens: Tokens, *, fused: bool, first_only: bool
) -> Tensor:
    """``[asking rows, heads · value size]``."""
    attention, linears = block.attention, block.projections
    if first_only:
        query = linears[0](asking)
        key, value = project(linears[1:], hidden) if fused else [m(hidden) for m in linears[1:]]
    elif fused:
        query, key, value = project(linears, hidden)
    else:
        query, key, value = (linear(hidden) for linear in linears)
    qk_size = getattr(attention, "qk_head_size", attention.attention_head_size)
    vo_size = getattr(attention, "vo_head_size", attention.attention_head_size)
    return attend(
        query.unflatten(-1, (-1, qk_size)),
        key.unflatten(-1, (-1, qk_size)),
        value.unflatten(-1, (-1, vo_size)),
        tokens,
        first_only=first_only,
        dropout=attention.dropout.p if attention.training else 0.0,  # as HuggingFace decides
        scale=attention.scaling,
    )


def _activate(dense: Any, act: Any, x: Tensor, *, fused: bool) -> Tensor:
    if fused and plain(dense) and dense.bias is not None and is_exact_gelu(act):
        return bias_gelu(F.linear(x, dense.weight), dense.bias)
    out: Tensor = act(dense(x))
    return out


def _close(closing: Closing, x: Tensor, residual: Tensor, *, fused: bool) -> Tensor:
    """LayerNorm(dropout(dense(x)) + residual)."""
    dense, dropout, norm = closing
    x = dense(x)
    if fused and _is_norm(norm) and (dropout is None or _is_dropout(dropout)):
        # Under autocast the residual stays wide and the product is narrow: add as PyTorch would.
        x = x.to(torch.promote_types(x.dtype, residual.dtype))
        residual = residual.to(x.dtype)
        rate = 0.0 if dropout is None else _rate(dropout)
        return dropout_add_norm(x, residual, norm.weight, norm.bias, dropout=rate, eps=norm.eps)
    out: Tensor = norm((x if dropout is None else dropout(x)) + residual)
    return out


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def without_row(table: Tensor, row: int | None) -> Tensor:
    """``table`` whose ``row`` gets no gradient, as ``padding_idx`` of ``nn.Embedding`` has it."""
    if row is None or not (table.requires_grad and torch.is_grad_enabled()):
        return table
    silent: Tensor = _WithoutRow.apply(table, row)  # type: ignore[no-untyped-call]
    return silent


class _WithoutRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not grad.is_sparse:
            grad.detach()[ctx.row].zero_()  # in place: it was made for this node alone
            return grad, None
        rows, values = grad._indices(), grad._values()
        values = values.masked_fill((rows[0] == ctx.row)[:, None], 0)
        return torch.sparse_coo_tensor(rows, values, grad.shape, check_invariants=False), None


def _is_norm(norm: Any) -> bool:
    return _has_weight(norm) and norm.bias is not None


def _has_weight(norm: Any) -> bool:
    return bare(norm, nn.LayerNorm) and norm.weight is not None


def _is_table(table: Any) -> bool:
    return bare(table, nn.Embedding) and table.max_norm is None and not table.scale_grad_by_freq


def _is_dropout(dropout: Any) -> bool:
    return bare(dropout, nn.Dropout, CounterDropout)
