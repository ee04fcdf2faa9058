"""CUDA graphs acted out on the CPU: a capture records the operators, a replay runs them again.

As on a GPU, a replay reads and writes the memory of the capture, and a capture changes nothing:
what it wrote into tensors that existed before is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BY_POINTERS = ("sensikernels_native", "sensikernels_shim")
"""Operators that write memory no argument names: none of their writes could be put back."""


def parts(values: Any) -> list[Tensor]:
    """The tensors in a tree, a sparse one as its indices and values."""
    found: list[Tensor] = []
    for t in tree_leaves(values):
        if isinstance(t, Tensor):
            found += [t._indices(), t._values()] if t.is_sparse else [t]
    return found


def home(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _BY_POINTERS and not func._schema.returns:
            self.calls.append((func, args, kwargs or {}, []))
            return None
        given = parts((args, kwargs))
        for tensor in given:
            key = home(tensor)
            if key not in self.made and key not in self.before:
                flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[key] = (flat, flat.clone())
        out = func(*args, **(kwargs or {}))
        old = {home(t) for t in given}
        fresh = [(i, t) for i, t in enumerate(parts(out)) if home(t) not in old]
        self.made |= {home(t) for _, t in fresh}
        self.calls.append((func, args, kwargs or {}, fresh))
        return out


class Graph:
    def __init__(self) -> None:
        self.recorder = Recorder()
        self.replays = 0

    def pool(self) -> int:
        return 1

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, fresh in self.recorder.calls:
            again = parts(func(*args, **kwargs))
            for place, mine in fresh:
                mine.copy_(again[place])


@contextmanager
def capturing(graph: Graph, **_: Any) -> Iterator[None]:
    with graph.recorder:
        yield
    for flat, saved in graph.recorder.before.values():
        flat.copy_(saved)


@pytest.fixture
def acted_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda``'s graphs and streams, acted out."""
    from sensikernels.training.graph import GraphedStep

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(GraphedStep, "_on_the_side", GraphedStep.eager)
    monkeypatch.setattr(GraphedStep, "_refusal", lambda self: None)
