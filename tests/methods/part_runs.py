"""Runs by hand of methods that train a part of a model, and the same runs killed on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels.masks import Geometry
from sensikernels.methods import Method, Run
from sensikernels.optim import SubsetAdamW
from sensikernels.training.runner import groups
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make

HEAD = "ForSequenceClassification"
Batch = dict[str, Tensor]


def make_run(model: nn.Module | None = None, *, max_steps: int = 8, **named: Any) -> Run:
    """A run of a small model with two batches to rank by."""
    model = make_model() if model is None else model
    return Run(
        model=model,
        optimizer=SubsetAdamW(groups(model, 0.1), lr=1e-2, max_grad_norm=1.0),
        max_steps=max_steps,
        batches=lambda: [make_batch(seed=100), make_batch(seed=101)],
        geometry=Geometry.uniform(9),
        **named,
    )


def family_run(kind: str, **named: Any) -> Run:
    """A run of a small model of another family."""
    run = make_run(make(kind, HEAD, **named))
    run.batches = lambda: [draw(HEAD, kind)]
    return run


def drive(
    method: Method, run: Run, stop: int, batch: Callable[[int], Batch] | None = None
) -> list[float]:
    """Train from ``run.step`` up to ``stop``; the losses."""
    losses = []
    for step in range(run.step, stop):
        run.step = step
        torch.manual_seed(step)
        method.begin_step(run)
        run.model.train()
        given = make_batch(seed=step) if batch is None else batch(step)
        loss = method.loss(run, run.model, given)
        loss.backward()
        method.before_step(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(float(loss.detach()))
    run.step = stop
    return losses


def values(model: nn.Module) -> Batch:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def in_head(name: str) -> bool:
    """Whether a parameter is one of the task's head, in any family."""
    return not {"classifier", "pooler", "pre_classifier", "head"}.isdisjoint(name.split("."))


def assert_resumes(make_method: Callable[[], Method], fresh: Callable[[], Run], at: int) -> None:
    """A run killed after ``at`` of 6 steps goes on to the same losses and the same bits."""
    whole, method = fresh(), make_method()
    method.begin(whole)
    first = drive(method, whole, at)
    saved = copy.deepcopy(
        (whole.plan, method.state(), whole.model.state_dict(), whole.optimizer.state_dict())
    )
    last = drive(method, whole, 6)
    again, method = fresh(), make_method()
    again.step = at
    again.plan, tensors, weights, moments = saved
    method.resume(again, tensors)
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(moments)
    assert drive(method, again, 6) == last
    assert len(first) == at
    mine, theirs = values(again.model), values(whole.model)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
