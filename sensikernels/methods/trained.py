"""Change which parameters train in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sensikernels._core.checks import require
from sensikernels.hf import applied, apply, restore, structure_of
from sensikernels.masks import Plan
from sensikernels.methods.base import Run


def train_only(
    run: Run, names: Iterable[str], *, method: str, flops: float | None = None, **origin: Any
) -> None:
    """From now on the parameters of these names train; ``run.plan`` says so.

    What trained before and still does keeps its moments; what is frozen loses them, so that it
    starts from none when it trains again. ``flops``: training FLOPs per token from now on (None:
    those of the dense step). Raises UsageError: a name is not a parameter's, or there is none.
    """
    model, wanted = run.model, set(names)
    if applied(model) is not None:
        restore(model, optimizer=run.optimizer)
    known = [name for name, _ in model.named_parameters()]
    unknown = sorted(wanted.difference(known))
    require(not unknown, "names", "parameters of the model", unknown[:3])
    require(bool(wanted), "names", "at least one parameter", "none")
    structure, length = structure_of(model).at(run.geometry), run.geometry.mean_length
    dense = structure.flops(length)
    run.plan = Plan(
        method=method,
        trainable=tuple(name for name in known if name in wanted),
        sequence_length=length,
        flops_dense=dense,
        flops_planned=dense if flops is None else flops,
        params_dense=structure.params(),
        params_planned=structure.params(),
        shapes=structure.shapes(),
        origin=origin,
    )
    apply(model, run.plan, optimizer=run.optimizer)
