"""Right calls of the attention over packed tokens, and its step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sensikernels import varlen_attention
from tests.ops.calls import Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import ROWS, drops, floats, ints, leaf, seed, stepped

ANY = ["scale", "max_length_query:huge", "max_length:huge", "window:huge"]


def lengths(cross: bool = False) -> dict[str, Any]:
    """Two sentences of five tokens, asked from four or from their own."""
    cu, cu_query = ints(0, 3, 5, dtype=torch.int32), ints(0, 1, 4, dtype=torch.int32)
    inputs = {"query": floats(4 if cross else 5, 2, 4), "key": floats(5, 2, 4)}
    ends = {"cu_seqlens": cu, "cu_seqlens_query": cu_query if cross else None}
    longest = {"max_length_query": 3, "max_length": 3}
    return {**inputs, "value": floats(5, 2, 3), **ends, **longest, "scale": 0.5, "window": 1}


def operators() -> Iterator[RightCall]:
    for backend in ("native", "buckets"):
        for cross in (False, True):
            name = f"{backend}{'/cross' if cross else ''}"
            index = ["cu_seqlens", *(["cu_seqlens_query"] if cross else [])]
            call = {**lengths(cross), **drops(), "backend": backend, "indices": index}
            more = "query:longer" if cross else "cu_seqlens:shorter"
            loose = [*ANY, "value:wide", "value:narrow", more]
            yield operator("varlen_attention", f"varlen_attention/{name}", **call, accepts=loose)
            queries = len(call["query"])
            yield operator(
                "varlen_attention_backward",
                f"varlen_attention_backward/{name}",
                dout=floats(queries, 2, 3),
                out=floats(queries, 2, 3),
                logsumexp=floats(2, queries),
                rng_state=torch.empty(0),
                **call,
                accepts=[*ANY, "rng_state", "out:empty", "logsumexp:empty", more],
            )


def functions() -> Iterator[RightCall]:
    for backend in ("native", "buckets", "reference"):
        call = {**lengths(cross=True), "dropout": 0.3, "seed": seed(), "backend": backend}
        accepts = [*ANY, "value:wide", "value:narrow", "query:longer"]
        index = ["cu_seqlens", "cu_seqlens_query"]
        name = f"varlen_attention/{backend}"
        yield function(name, varlen_attention, **call, accepts=accepts, indices=index)


def launchers() -> Iterator[RightCall]:
    cu = ints(0, 3, 5, dtype=torch.int32)
    q, v = floats(5, 2, 4), floats(5, 2, 3)
    ends = {"cu_seqlens_query": cu, "cu_seqlens": cu}
    call = {"query": q, "key": q, "value": v, **ends, **drops(), "scale": 0.5, "window": 1}
    call["pairs"] = True
    yield launcher("varlen_attention", **call, out=v, logsumexp=floats(2, 5))
    yield launcher("varlen_attention_backward", dout=v, **call, dq=q, dk=q, dv=v)
    yield launcher("varlen_attention_drop", p=floats(2, 2, 3, 3), starts=cu[:2], **drops())


def step(backend: str, device: str) -> list[Tensor]:
    q, k, v = (leaf(ROWS, 2, 32, device=device) for _ in range(3))
    ends = torch.tensor([0, 5, 21, ROWS], dtype=torch.int32, device=device)
    return stepped(varlen_attention(q, k, v, ends, max_length=27, backend=backend), q, k, v)


STEP = Step("varlen_attention", step, triton=())
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
