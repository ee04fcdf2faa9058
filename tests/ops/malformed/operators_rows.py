"""Right calls of the operators over the rows of a matrix, and of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.ops.malformed.calls import floats, ints, operator, seed
from tests.ops.malformed.damage import Base


def gelus() -> Iterator[Base]:
    x = floats(3, 8)
    for backend in ("native", "reference"):
        run = {"backend": backend}
        yield operator(
            "bias_gelu",
            f"bias_gelu/{backend}",
            x=x,
            bias=floats(8),
            **run,
            accepts=[
                "x:longer",
                "x:shorter",
                "x:deeper",
                "bias:wider",
                *(["x:wider"] if backend == "reference" else []),
            ],
        )
        yield operator(
            "bias_gelu_backward",
            f"bias_gelu_backward/{backend}",
            dy=x,
            x=x,
            bias=floats(8),
            bias_needed=True,
            accepts=["bias:wider"],
            **run,
        )


def dropouts() -> Iterator[Base]:
    x, affine = floats(3, 8), {"weight": floats(8), "bias": floats(8)}
    wide = ["weight:wider", "bias:wider"]
    for backend in ("native", "reference"):
        run = {"backend": backend}
        any_shape = [
            f"x:{how}"
            for how in (
                "empty",
                "deeper",
                "flatter",
                "longer",
                "shorter",
                "wide",
                "narrow",
                "wider",
            )
        ]
        if backend == "native":
            any_shape.remove("x:wider")
        yield operator(
            "dropout",
            f"dropout/{backend}",
            x=x,
            seed=seed(),
            threshold=40000,
            **run,
            accepts=any_shape,
        )
        drops = {"seed": seed(), "threshold": 40000}
        yield operator(
            "dropout_add_norm",
            f"dropout_add_norm/{backend}",
            x=x,
            residual=x,
            **affine,
            **drops,
            eps=1e-12,
            save=True,
            accepts=wide,
            **run,
        )
        saved = {"dy": x, "before": x, "moments": floats(3, 2)}
        yield operator(
            "dropout_add_norm_backward",
            f"dropout_add_norm_backward/{backend}",
            **saved,
            **affine,
            **drops,
            affine_needed=True,
            accepts=[*wide, "dy:deeper"],
            **run,
        )


def embeddings() -> Iterator[Base]:
    ids = [ints(0, 4, 1, 2), ints(0, 1, 2, 2), ints(0, 1, 0, 1)]
    tables = [floats(5, 8), floats(3, 8), floats(2, 8)]
    drops = {"seed": seed(), "threshold": 40000}
    longer = [f"tables:{i}-longer" for i in range(3)]  # rows that nothing names
    for backend in ("native", "reference"):
        run = {"backend": backend, "indices": ["ids"]}
        yield operator(
            "embed_norm",
            f"embed_norm/{backend}",
            ids=ids,
            tables=tables,
            weight=floats(8),
            bias=floats(8),
            **drops,
            eps=1e-12,
            accepts=["weight:wider", "bias:wider", *longer],
            **run,
        )
        yield operator(
            "embed_norm_backward",
            f"embed_norm_backward/{backend}",
            dy=floats(4, 8),
            ids=ids,
            tables=tables,
            moments=floats(4, 2),
            weight=floats(8),
            **drops,
            affine_needed=True,
            accepts=["weight:wider", *longer],
            **run,
        )
        yield operator(
            "add_rows",
            f"add_rows/{backend}",
            rows=floats(4, 8),
            index=ids[0],
            count=5,
            backend=backend,
            indices=["index"],
            accepts=[
                "rows:wide",
                "rows:narrow",
                "index:deeper",
                "count:huge",
                *(["rows:wider"] if backend == "reference" else []),
            ],
        )


def losses() -> Iterator[Base]:
    labels = ints(0, -100, 4)
    for backend in ("native", "reference"):
        run = {"labels": labels, "ignore_index": -100, "backend": backend, "indices": ["labels"]}
        other = ["ignore_index", "logits:wide", *(["logits:wider"] if backend != "native" else [])]
        yield operator(
            "cross_entropy", f"cross_entropy/{backend}", logits=floats(3, 5), **run, accepts=other
        )
        yield operator(
            "cross_entropy_backward",
            f"cross_entropy_backward/{backend}",
            dloss=torch.ones(()),
            logits=floats(3, 5),
            stats=torch.ones(3, 2),
            scale=torch.ones(()),
            **run,
            accepts=["ignore_index", "logits:wide", "dloss:wider"],
        )


def attention() -> Iterator[Base]:
    cu, cu_query = ints(0, 3, 5, dtype=torch.int32), ints(0, 1, 4, dtype=torch.int32)
    for backend in ("native", "buckets"):
        for cross in (False, True):
            queries = 4 if cross else 5
            name = f"{backend}{'/cross' if cross else ''}"
            call = {
                "query": floats(queries, 2, 4),
                "key": floats(5, 2, 4),
                "value": floats(5, 2, 3),
                "cu_seqlens_query": cu_query if cross else None,
                "cu_seqlens": cu,
                "seed": seed(),
                "max_length_query": 3,
                "max_length": 3,
                "threshold": 40000,
                "scale": 0.5,
                "backend": backend,
            }
            loose = [
                "scale",
                "max_length_query:huge",
                "max_length:huge",
                "value:wide",
                "value:narrow",
                "query:longer" if cross else "cu_seqlens:shorter",
            ]
            index = ["cu_seqlens", *(["cu_seqlens_query"] if cross else [])]
            yield operator(
                "varlen_attention", f"varlen_attention/{name}", **call, accepts=loose, indices=index
            )
            saved = {
                "dout": floats(queries, 2, 3),
                "out": floats(queries, 2, 3),
                "logsumexp": floats(2, queries),
                "rng_state": torch.empty(0),
            }
            yield operator(
                "varlen_attention_backward",
                f"varlen_attention_backward/{name}",
                **saved,
                **call,
                indices=index,
                accepts=[
                    "scale",
                    "max_length_query:huge",
                    "max_length:huge",
                    "rng_state",
                    "out:empty",
                    "logsumexp:empty",
                    *loose[-1:],
                ],
            )


ROWS = (gelus, dropouts, embeddings, losses, attention)
