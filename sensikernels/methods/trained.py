"""Change which parameters train in the middle of a run, and rank what does not train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.hf import (
    applied,
    apply,
    below_layers,
    checked_loss,
    encoder_layers,
    family_of,
    modes_kept,
    own_loss,
    restore,
    structure_of,
)
from sensikernels.hf.features import has_features
from sensikernels.methods.base import Batch, Run
from sensikernels.methods.parts import Parts, plan_of

Gradients = Callable[[Batch], Mapping[str, Tensor]]


def train_only(run: Run, names: Iterable[str], *, method: str, **origin: Any) -> None:
    """From now on the parameters of these names train; ``run.plan`` says so, and what it costs.

    What trained before and still does keeps its moments; what is frozen loses them, so that it
    starts from none when it trains again. What was frozen before the run stays so, named or not.
    ``origin``: what the plan says of how it came about.

    Raises:
        UsageError: a name is not a parameter's, or none is left that may train; the model has
            features of ``apply``, which ``restore`` would switch off with the plan.
    """
    model, wanted = run.model, set(names)
    plain = "no features of apply (use_packed and use_counter_dropout change the model alone)"
    require(not has_features(model), "model", plain, "some in use")
    known = {name for name, _ in model.named_parameters()}
    unknown = sorted(wanted - known)
    require(not unknown, "names", "parameters of the model", unknown[:3])
    if applied(model) is not None:
        restore(model, optimizer=run.optimizer)
    trainable = tuple(n for n, p in model.named_parameters() if n in wanted and p.requires_grad)
    require(bool(trainable), "names", "at least one parameter that is not frozen", "none")
    run.plan = plan_of(
        run,
        method,
        Parts(whole=trainable),
        trainable=trainable,
        shapes=structure_of(model).shapes(),
        origin=origin,
    )
    apply(model, run.plan, optimizer=run.optimizer)


def train_as_planned(run: Run) -> None:
    """Train what ``run.plan`` names, as a run did that was killed."""
    if run.plan is not None:
        assert run.plan.trainable is not None
        train_only(run, run.plan.trainable, method=run.plan.method, **run.plan.origin)


def names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of all parameters, in the model's order."""
    return tuple(name for name, _ in model.named_parameters())


def head_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters over the encoder: those of a head that begins at random.

    Empty for an encoder without one. Raises UsageError for a model of no known family.
    """
    family = family_of(model)
    encoder = below_layers(model)[0].removesuffix(family.below[0])
    return tuple(name for name in names_of(model) if encoder and not name.startswith(encoder))


def outside_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of no encoder layer: embeddings, pooler, head."""
    layers = tuple(f"{layer.prefix}." for layer in encoder_layers(model))
    return tuple(name for name in names_of(model) if not name.startswith(layers))


@contextmanager
def ranking_gradients(run: Run, names: Iterable[str]) -> Iterator[Gradients]:
    """Gives a function from a batch of ``run.batches()`` to this process's gradients, by name.

    Of exactly the parameters of ``names``, frozen or not, without dropout; zero for what the loss
    does not read, row-sparse for a row-sparse table. Training mode, ``requires_grad``, gradients
    and the random state are as before at the end. Raises UsageError for a loss that is not finite.
    """
    model, wanted = run.model, set(names)
    params = {name: p for name, p in model.named_parameters() if name in wanted}
    required = [(p, p.requires_grad) for p in model.parameters()]
    devices = list({p.device for p, _ in required if p.device.type == "cuda"})
    loss_of = checked_loss(run.compute_loss or own_loss)

    def gradients(batch: Batch) -> Mapping[str, Tensor]:
        device = required[0][0].device
        moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
        with torch.enable_grad():
            loss = loss_of(model, moved)
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        return dict(zip(params, grads, strict=True))

    with torch.random.fork_rng(devices), modes_kept(model):
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        try:
            yield gradients
        finally:
            for parameter, was in required:
                parameter.requires_grad_(was)
