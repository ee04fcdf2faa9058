"""Right calls of three embeddings and their normalization, and their step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sensikernels import embed_norm
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import IN, ROWS, affine, drops, floats, ints, leaf, normalization, stepped


def operators() -> Iterator[RightCall]:
    ids = [ints(0, 4, 1, 2), ints(0, 1, 2, 2), ints(0, 1, 0, 1)]
    longer = [f"tables:{i}-longer" for i in range(3)]  # rows that nothing names
    for backend in BACKENDS:
        tables = [floats(5, 8), floats(3, 8), floats(2, 8)]
        run = {"ids": ids, "tables": tables, **drops(), "backend": backend, "indices": ["ids"]}
        name, accepts = f"embed_norm/{backend}", ["weight:wider", "bias:wider", *longer]
        yield operator("embed_norm", name, **affine(), eps=1e-12, accepts=accepts, **run)
        saved = {"dy": floats(4, 8), "moments": floats(4, 2), "weight": floats(8)}
        name, accepts = f"embed_norm_backward/{backend}", ["weight:wider", *longer]
        back = {**saved, "affine_needed": True, "accepts": accepts}
        yield operator("embed_norm_backward", name, **back, **run)
        wide = ["rows:wider"] if backend == "reference" else []
        yield operator(
            "add_rows",
            f"add_rows/{backend}",
            rows=floats(4, 8),
            index=ids[0],
            count=5,
            backend=backend,
            indices=["index"],
            accepts=["rows:wide", "rows:narrow", "index:deeper", "count:huge", *wide],
        )


def functions() -> Iterator[RightCall]:
    names = ("input_ids", "position_ids", "token_type_ids")
    ids = (ints(0, 4, 1, 2), ints(0, 1, 2, 2), ints(0, 1, 0, 1))
    tables = {"word": 5, "position": 3, "token_type": 2}
    for backend in BACKENDS:
        yield function(
            f"embed_norm/{backend}",
            embed_norm,
            accepts=["weight:wider", "bias:wider", *(f"{table}:longer" for table in tables)],
            indices=names,
            **dict(zip(names, ids, strict=True)),
            **{name: floats(rows, 8) for name, rows in tables.items()},
            **normalization(),
            backend=backend,
        )


def launchers() -> Iterator[RightCall]:
    x, moments = floats(3, 8), floats(3, 2)
    ids = {"id0": ints(0, 4, 1), "id1": ints(0, 1, 2), "id2": ints(0, 1, 0)}
    tables = {"table0": floats(5, 8), "table1": floats(3, 8), "table2": floats(2, 8)}
    both = {**ids, **tables, "moments": moments, **drops()}
    yield launcher("embed_norm", **both, **affine(), eps=1e-12, y=x)
    grads = {"dsum": x, "daffine": floats(2, 8)}
    yield launcher("embed_norm_backward", dy=x, **both, weight=floats(8), **grads)
    yield launcher("add_rows", rows=x, index=ints(0, 4, 1), out=torch.zeros(5, 8))


def step(backend: str, device: str) -> list[Tensor]:
    place = torch.arange(ROWS, device=device)
    tables = [leaf(rows, IN, device=device) for rows in (30, ROWS, 2)]
    leaves = (*tables, *(leaf(IN, device=device) for _ in range(2)))
    out = embed_norm(place * 7 % 30, place, place % 2, *leaves, backend=backend)
    return stepped(out, *leaves)


STEP = Step("embed_norm", step)
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
