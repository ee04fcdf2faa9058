"""GreenTrainer: the tensors that matter most within a FLOPs budget of the step (2309.13192)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.hf.trained_flops import TrainedFlops, Unit
from sensikernels.methods.base import Batch, Method, Run, option
from sensikernels.methods.trained import (
    head_of,
    names_of,
    ranking_gradients,
    train_as_planned,
    train_only,
)
from sensikernels.ops.select_kept import select_chain
from sensikernels.optim import SubsetAdamW


def choose(units: list[Unit], importance: Mapping[str, float], budget: float) -> list[str]:
    """The names of the units of highest importance whose gradients fit ``budget`` FLOPs a token."""
    columns = (
        [sum(importance.get(name, 0.0) for name in unit.names) for unit in units],
        [unit.t_dw for unit in units],
        [unit.t_dy for unit in units],
    )
    worth, t_dw, t_dy = (torch.tensor(column, dtype=torch.float64) for column in columns)
    largest = worth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    kept = select_chain(worth / largest, t_dw, t_dy, budget).tolist()
    return [name for unit, bit in zip(units, kept, strict=True) if bit for name in unit.names]


def importances(run: Run, batch: Batch, rate: float) -> dict[str, float]:
    """I = −Σ Δw·∂L/∂w of every tensor that trains, by name.

    Δw is one step of a copy of the run's optimizer on ``batch``; the gradient is that of the same
    batch after it. Weights, moments and gradients are as before at the end. ``rate`` takes the
    place of a learning rate of 0, as warm-up begins with.
    """
    params = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    trial = _trial(run, rate)
    with torch.no_grad(), ranking_gradients(run, params) as gradients, _put_back(params):
        trial.flush()
        before = {name: _exact(trial, p).clone() for name, p in params.items()}
        first = gradients(batch)
        for name, parameter in params.items():
            parameter.grad = first[name]
        trial.step()
        second = gradients(batch)
        moved = {name: _exact(trial, p) - before[name] for name, p in params.items()}
        return {name: -_dot(moved[name], second[name]) for name in params}


@dataclass(kw_only=True, eq=False)
class GreenTrainer(Method):
    """Train the tensors whose step lowers the loss most, within ``share`` of the dense FLOPs.

    Huang et al. 2023, arXiv 2309.13192. ``selections`` times, evenly spread over the run, one AdamW
    step on one batch is tried and taken back, and the gradient after it gives every tensor's
    importance. Dynamic programming then keeps the set of highest importance whose step costs at
    most ``share``: forward, weight gradients of what is chosen, and input gradients down to the
    lowest. The head always trains and is paid for. The two passes of a selection are not.
    """

    name = "green-trainer"
    summary = "the tensors that lower the loss most train, within a share of the step's FLOPs"
    schedule = "linear"
    needs_whole_gradients = True

    share: float = option(0.5, "FLOPs of a step as a share of the dense step's")
    selections: int = option(3, "how often tensors are chosen, evenly spread over the run")

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", "a share in (0, 1]", self.share)
        require(self.selections >= 1, "selections", "at least 1", self.selections)

    def begin(self, run: Run) -> None:
        """Check optimizer, head and budget. Raises UsageError, naming the smallest ``share``."""
        inner = run.inner_optimizer
        known = isinstance(inner, (SubsetAdamW, torch.optim.AdamW))
        require(known, "optimizer", "SubsetAdamW or AdamW", type(inner).__name__)
        head = head_of(run.model)
        require(bool(head), "model", "one with a head", type(run.model).__name__)
        costs = TrainedFlops.of(run.model, run.geometry)
        least = costs.total(head) / costs.total(costs.depths)
        wanted = f"at least {math.ceil(least * 1e4) / 1e4:g}, forward pass and head alone"
        require(self.share >= least, "share", wanted, self.share)

    def begin_step(self, run: Run) -> None:
        """Choose anew at the start of each part of the run."""
        if run.step in {i * run.max_steps // self.selections for i in range(self.selections)}:
            self._select(run)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Train what was chosen last."""
        self.begin(run)
        train_as_planned(run)

    def _select(self, run: Run) -> None:
        train_only(run, names_of(run.model), method=self.name)
        costs = TrainedFlops.of(run.model, run.geometry)
        head = head_of(run.model)
        budget = self.share * costs.total(costs.depths) - costs.total(head)
        importance = importances(run, self._batch(run), self.learning_rate)
        units = costs.chain(above=head)
        chosen: list[str] = run.world.agree(lambda: choose(units, importance, max(budget, 0.0)))
        train_only(run, (*head, *chosen), method=self.name, step=run.step)
        assert run.plan is not None
        run.events.append(
            f"step {run.step}: {len(head) + len(chosen)} of {len(importance)} tensors train, "
            f"FLOPs x{run.plan.flops_ratio:.4f}"
        )

    def _batch(self, run: Run) -> Batch:
        """The first ranking batch of the first process, for all, on the host."""

        def first() -> dict[str, Any] | None:
            batch = next(iter(run.batches()), None)
            if batch is None:
                return None
            return {n: v.cpu() if isinstance(v, Tensor) else v for n, v in batch.items()}

        told: dict[str, Any] | None = run.world.agree(first)
        require(told is not None, "batches", "at least one to rank by", "none")
        assert told is not None
        return told


@contextmanager
def _put_back(params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give weights and gradients back as they were."""
    saved = [(p, p.detach().clone(), p.grad) for p in params.values()]
    try:
        yield
    finally:
        for parameter, value, grad in saved:
            parameter.copy_(value)
            parameter.grad = grad


def _trial(run: Run, rate: float) -> SubsetAdamW:
    """An optimizer of the same parameters, settings and moments, which are its own copies."""
    inner = run.inner_optimizer
    clip = getattr(inner, "max_grad_norm", None)
    groups = [{"params": list(group["params"])} for group in inner.param_groups]
    trial = SubsetAdamW(groups, max_grad_norm=clip)
    trial.load_state_dict(inner.state_dict())
    for group in trial.param_groups:
        group["lr"] = float(group["lr"]) or rate
    return trial


def _exact(trial: SubsetAdamW, parameter: nn.Parameter) -> Tensor:
    """The weight before it is rounded."""
    return trial.state.get(parameter, {}).get("master", parameter.detach()).float()


def _dot(moved: Tensor, grad: Tensor) -> float:
    """Σ of products; of a row-sparse gradient over its own rows."""
    if grad.is_sparse:
        grad = grad.coalesce()
        moved, grad = moved[grad.indices()[0]], grad.values()
    return float((moved * grad.float()).sum(dtype=torch.float64))
