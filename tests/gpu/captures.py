"""Captured graphs, and calls in which nothing may wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor

from sensikernels.layouts import Layout


@contextmanager
def no_waiting() -> Iterator[None]:
    """A host synchronisation inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(
    run: Callable[[], list[Tensor]], *, before: int = 1
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of ``run``, after ``before`` calls beside it, and the tensors it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(before):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def rewrite(layout: Layout, other: Layout) -> None:
    """Put the index tensors of ``other`` where those of ``layout`` lie."""
    for field in fields(layout):
        old = getattr(layout, field.name)
        if isinstance(old, Tensor):
            old.copy_(getattr(other, field.name))
