"""A right call of every public function of ``sensikernels.ops``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sensikernels.layouts import CompactLayout, layout_of
from sensikernels.ops.bias_gelu import bias_gelu
from sensikernels.ops.cross_entropy import cross_entropy
from sensikernels.ops.dropout import dropout
from sensikernels.ops.dropout_add_norm import dropout_add_norm
from sensikernels.ops.embed_norm import embed_norm
from sensikernels.ops.group_reduce import group_reduce, per_sample_grad_squared
from sensikernels.ops.masked_linear import masked_linear
from sensikernels.ops.select_kept import select_chain, select_elements, select_kept
from sensikernels.ops.selective_linear import selective_linear
from sensikernels.ops.subset_adamw import subset_adamw
from sensikernels.ops.varlen_attention import varlen_attention
from tests.ops.malformed.calls import floats, ints, seed
from tests.ops.malformed.damage import Base

BACKENDS = ("native", "reference")


def function(
    name: str,
    call: Callable[..., Any],
    accepts: Sequence[str] = (),
    indices: Sequence[str] = (),
    ascending: Sequence[str] = (),
    **arguments: Any,
) -> Base:
    return Base(
        name=name,
        call=call,
        arguments=arguments,
        accepts=frozenset(accepts),
        indices=tuple(indices),
        ascending=tuple(ascending),
    )


def linears() -> Iterator[Base]:
    grid = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    blocks = layout_of(grid, (4, 8), (12, 32))
    tokens = ["x:longer", "x:shorter", "x:deeper"]
    for backend in BACKENDS:
        yield function(
            f"masked_linear/{backend}",
            masked_linear,
            tokens,
            x=floats(5, 32),
            values=floats(*blocks.values_shape),
            layout=blocks,
            bias=floats(12),
            activation="gelu",
            backend=backend,
        )
        yield function(
            f"selective_linear/{backend}",
            selective_linear,
            tokens,
            x=floats(5, 32),
            weight=floats(12, 32),
            values=floats(*blocks.values_shape).requires_grad_(),
            layout=blocks,
            bias=floats(12),
            activation="gelu",
            backend=backend,
        )

        def compact(rows: Tensor, columns: Tensor, backend: str) -> Tensor:
            layout = CompactLayout(shape=(12, 32), rows=rows, columns=columns)
            return masked_linear(floats(5, 32), floats(3, 4), layout, backend=backend)

        yield function(
            f"CompactLayout/{backend}",
            compact,
            rows=ints(0, 2, 11, dtype=torch.int32),
            backend=backend,
            columns=ints(1, 2, 7, 31, dtype=torch.int32),
            indices=["rows", "columns"],
            ascending=["rows", "columns"],
        )


def affine() -> dict[str, Any]:
    """What normalizations with dropout take in common."""
    norm = {"weight": floats(8), "bias": floats(8)}
    return {**norm, "dropout": 0.3, "eps": 1e-12, "seed": seed()}


def elementwise() -> Iterator[Base]:
    for backend in BACKENDS:
        run = {"backend": backend}
        any_shape = [
            f"x:{how}"
            for how in ("empty", "deeper", "flatter", "longer", "shorter", "wide", "narrow")
        ]
        wide = ["x:wider"] if backend == "reference" else []
        yield function(
            f"dropout/{backend}",
            dropout,
            [*any_shape, *wide],
            x=floats(3, 8),
            p=0.3,
            seed=seed(),
            **run,
        )
        yield function(
            f"bias_gelu/{backend}",
            bias_gelu,
            ["x:longer", "x:shorter", "x:deeper", "bias:wider", *wide],
            x=floats(3, 8),
            bias=floats(8),
            **run,
        )
        yield function(
            f"dropout_add_norm/{backend}",
            dropout_add_norm,
            ["weight:wider", "bias:wider"],
            x=floats(3, 8),
            residual=floats(3, 8),
            **affine(),
            recover="auto",
            **run,
        )


def embeddings() -> Iterator[Base]:
    for backend in BACKENDS:
        run = {"backend": backend}
        yield function(
            f"embed_norm/{backend}",
            embed_norm,
            ["weight:wider", "bias:wider", "word:longer", "position:longer", "token_type:longer"],
            indices=["input_ids", "position_ids", "token_type_ids"],
            input_ids=ints(0, 4, 1, 2),
            position_ids=ints(0, 1, 2, 2),
            token_type_ids=ints(0, 1, 0, 1),
            word=floats(5, 8),
            position=floats(3, 8),
            token_type=floats(2, 8),
            **affine(),
            **run,
        )
        yield function(
            f"cross_entropy/{backend}",
            cross_entropy,
            ["ignore_index", "logits:wide", *(["logits:wider"] if backend == "reference" else [])],
            indices=["labels"],
            logits=floats(3, 5),
            labels=ints(0, -100, 4),
            ignore_index=-100,
            **run,
        )


def attention() -> Iterator[Base]:
    for backend in ("native", "buckets", "reference"):
        yield function(
            f"varlen_attention/{backend}",
            varlen_attention,
            [
                "scale",
                "max_length:huge",
                "max_length_query:huge",
                "value:wide",
                "value:narrow",
                "query:longer",
            ],
            indices=["cu_seqlens", "cu_seqlens_query"],
            query=floats(4, 2, 4),
            key=floats(5, 2, 4),
            value=floats(5, 2, 3),
            cu_seqlens=ints(0, 3, 5, dtype=torch.int32),
            max_length=3,
            cu_seqlens_query=ints(0, 1, 4, dtype=torch.int32),
            max_length_query=3,
            dropout=0.3,
            scale=0.5,
            seed=seed(),
            backend=backend,
        )


def selections() -> Iterator[Base]:
    n = 6
    for backend in BACKENDS:
        yield function(
            f"select_kept/{backend}",
            select_kept,
            [
                "segments:narrower",
                "kinds:narrower",
                "scores:wider",
                "costs:wider",
                "costs:kind",
                "multiple:huge",
            ],
            indices=["segments", "kinds"],
            scores=floats(n),
            budget=4.0,
            costs=torch.ones(n),
            segments=ints(0, 0, 1, 1, 1, 2),
            kinds=ints(0, 0, 1, 1, 1, 0),
            n_segments=3,
            minimum=0,
            multiple=1,
            scope="global",
            backend=backend,
        )
        tensors = [floats(3, 4), floats(5)]
        yield function(
            f"select_elements/{backend}",
            select_elements,
            ["tensors:0-wider", "tensors:1-wider", "grads:0-wider", "grads:1-wider"]
            if backend == "reference"
            else [],
            tensors=tensors,
            grads=tensors,
            k=7,
            score="abs_wg",
            scope="global",
            backend=backend,
        )
        yield function(
            f"select_chain/{backend}",
            select_chain,
            [
                f"{name}:{how}"
                for name in ("importance", "t_dw", "t_dy")
                for how in ("kind", "wider", "narrower")
            ]
            + ["bins:huge", "importance:meta", "t_dw:meta"],
            importance=torch.rand(n),
            t_dw=torch.rand(n),
            t_dy=torch.rand(n),
            budget=2.0,
            bins=100,
            backend=backend,
        )


def reductions() -> Iterator[Base]:
    weights = [floats(4, 6), floats(5)]
    ids = ints(0, 1, 1, -1, 0, dtype=torch.int32)

    def by_ids(ids: Tensor, backend: str) -> Any:
        groups = [("block", 2, 3), ("ids", ids, 2)]
        return group_reduce(weights, weights, ["sum_wg"], groups=groups, backend=backend)

    for backend in BACKENDS:
        wide = [f"{name}:{i}-wider" for name in ("weights", "grads") for i in range(2)]
        yield function(
            f"group_reduce/{backend}",
            group_reduce,
            ["statistics:shorter", "statistics:longer", *(wide if backend == "reference" else [])],
            weights=weights,
            grads=weights,
            statistics=["sum_abs_wg", "max_abs_grad"],
            groups="row",
            backend=backend,
        )
        yield function(
            f"group_reduce/{backend}/ids", by_ids, indices=["ids"], ids=ids, backend=backend
        )
    yield function(
        "per_sample_grad_squared",
        per_sample_grad_squared,
        ["x:wide", "x:narrow", "x:wider", "grad_y:wide", "grad_y:narrow", "grad_y:wider"],
        x=floats(2, 3, 4),
        grad_y=floats(2, 3, 5),
        groups="row",
    )


def steps() -> Iterator[Base]:
    def run(index: Tensor, backend: str, **named: Any) -> Tensor:
        lists = {k: [v] for k, v in named.items() if k.endswith("s") and isinstance(v, Tensor)}
        return subset_adamw(**{**named, **lists}, kept=[("rows", index)], backend=backend)

    for backend in BACKENDS:
        yield function(
            f"subset_adamw/{backend}",
            run,
            [
                "grads:wider",
                "grad_scale:wider",
                "found_inf:wider",
                "grad_scale:deeper",
                "found_inf:deeper",
                "steps:deeper",
                "masters:empty",
            ],
            indices=["index"],
            ascending=["index"],
            index=ints(0, 2, dtype=torch.int32),
            params=floats(4, 6),
            grads=floats(4, 6),
            exp_avgs=torch.zeros(2, 6),
            exp_avg_sqs=torch.zeros(2, 6),
            masters=torch.zeros(2, 6),
            steps=torch.tensor(0.0),
            lr=1e-3,
            eps=1e-8,
            weight_decay=0.01,
            max_grad_norm=1.0,
            grad_scale=torch.tensor(2.0),
            found_inf=torch.tensor(0.0),
            mode="hard_freeze",
            backend=backend,
        )


MAKERS = (linears, elementwise, attention, selections, reductions, steps)
