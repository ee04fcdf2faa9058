"""Right calls of the cross-entropy, and its step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sensikernels import cross_entropy
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import ROWS, floats, ints, leaf, stepped


def loss(backend: str) -> dict[str, Any]:
    """A loss of three rows, one of them ignored."""
    accepts = ["ignore_index", "logits:wide", *(["logits:wider"] if backend != "native" else [])]
    given = {"logits": floats(3, 5), "labels": ints(0, -100, 4), "ignore_index": -100}
    return {**given, "backend": backend, "indices": ["labels"], "accepts": accepts}


def operators() -> Iterator[RightCall]:
    for backend in BACKENDS:
        yield operator("cross_entropy", f"cross_entropy/{backend}", **loss(backend))
        saved = {"dloss": torch.ones(()), "stats": torch.ones(3, 2), "scale": torch.ones(())}
        accepts = ["ignore_index", "logits:wide", "dloss:wider"]
        back = {**loss(backend), **saved, "accepts": accepts}
        yield operator("cross_entropy_backward", f"cross_entropy_backward/{backend}", **back)


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        yield function(f"cross_entropy/{backend}", cross_entropy, **loss(backend))


def launchers() -> Iterator[RightCall]:
    rows = {"logits": floats(3, 5), "labels": ints(0, -100, 4), "ignored": -100}
    both = {**rows, "stats": torch.ones(3, 2), "scale": torch.ones(())}
    yield launcher("cross_entropy", **both, loss=torch.ones(()))
    back = {"dloss": torch.ones(()), "dlogits": floats(3, 5)}
    yield launcher("cross_entropy_backward", **both, **back)


def step(backend: str, device: str) -> list[Tensor]:
    logits = leaf(ROWS, 31, device=device)
    labels = (torch.arange(ROWS) % 31).to(device)
    return stepped(cross_entropy(logits, labels, backend=backend), logits)


STEP = Step("cross_entropy", step)
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=(STEP,))
