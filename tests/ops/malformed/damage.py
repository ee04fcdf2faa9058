"""Every way to damage one argument of a call that was right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.ops.calls import RightCall

BIG = (1 << 31) - 1


def damages(base: RightCall) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(argument:damage, arguments to replace)``."""
    for name, value in base.arguments.items():
        for how, other in _of(value, name in base.indices, name in base.ascending):
            label = f"{name}:{how}"
            if name not in base.accepts and label not in base.accepts:
                yield label, {name: other}


def _of(value: Any, index: bool, ascending: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from _tensor(value)
        if index and value.numel() and value.dtype in (torch.int32, torch.int64):
            yield from _index(value, ascending)
    elif isinstance(value, bool):
        return
    elif isinstance(value, str):
        yield "unknown", "nonsense"
    elif isinstance(value, int):
        yield from (("negative", -1), ("huge", 1 << 40))
    elif isinstance(value, float):
        yield from (("nan", math.nan), ("negative", -1.0))
    elif isinstance(value, list):
        yield from _list(value, index, ascending)


def _list(values: list[Any], index: bool, ascending: bool) -> Iterator[tuple[str, Any]]:
    yield "none", []
    yield "shorter", values[:-1]
    yield "longer", [*values, values[-1]]
    for i, value in enumerate(values):
        for how, other in _of(value, index, ascending):
            yield f"{i}-{how}", [*values[:i], other, *values[i + 1 :]]


def _tensor(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "meta", t.to("meta")
    floating = t.is_floating_point()
    yield "kind", t.to(torch.int64) if floating else t.to(torch.float32)
    if floating:
        yield "complex", t.to(torch.complex64)
        yield "wider", t.to(torch.float64 if t.dtype != torch.float64 else torch.float32)
    else:
        yield "narrower", t.to(torch.int16)
    yield "empty", t.new_empty(0)
    yield "deeper", t[None]
    if t.dim():
        yield "flatter", t.flatten() if t.dim() > 1 else t[0] if len(t) else t.sum()
        yield "longer", torch.cat([t, t])
        if t.shape[0]:
            yield "shorter", t[:-1]
    if t.dim() > 1:
        yield "wide", torch.cat([t, t], -1)
        if t.shape[-1]:
            yield "narrow", t[..., :-1]


def _index(t: Tensor, ascending: bool) -> Iterator[tuple[str, Tensor]]:
    """A wrong value first, in the middle and last."""
    for place in sorted({0, t.numel() // 2, t.numel() - 1}):
        for wrong in (-7, BIG):
            yield f"{wrong}@{place}", _put(t, place, wrong)
        if t.dtype == torch.int64:
            yield f"far@{place}", _put(t, place, 1 << 40)
    if ascending and t.numel() > 1:
        yield "falls", t.flip(0)
        yield "repeats", _put(t, 1, int(t.flatten()[0]))


def _put(t: Tensor, place: int, value: int) -> Tensor:
    other = t.clone().contiguous()
    other.view(-1)[place] = value
    return other
