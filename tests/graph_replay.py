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


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sensikernels_native":  # writes through pointers
            self.calls.append((func, args, kwargs or {}, []))
            return None
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in given:
            key = tensor.untyped_storage().data_ptr()
            if key not in self.made and key not in self.before:
                flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[key] = (flat, flat.clone())
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in given}
        fresh = [
            t for t in tree_leaves(out)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in old
        ]  # fmt: skip
        self.made |= {t.untyped_storage().data_ptr() for t in fresh}
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
            out = tree_leaves(func(*args, **kwargs))
            if fresh:
                again = [t for t in out if isinstance(t, Tensor)][: len(fresh)]
                for mine, new in zip(fresh, again, strict=True):
                    mine.copy_(new)


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
