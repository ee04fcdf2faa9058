"""Child-Tuning: a part of the entries trains, the others' gradients are masked (2109.05687)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sensikernels._core.bits import unpack_bits
from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import checked_loss, encoder_layers, modes_kept, own_loss
from sensikernels.masks import Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.streams import stream
from sensikernels.ops.select_kept import select_elements

VARIANTS = ("D", "F")
_FREEZES = "child-tuning D without as_published"
MAX_NORM = 1.0
"""Each parameter's gradient of a batch is clipped to this norm before it is squared."""


@dataclass(kw_only=True, eq=False)
class ChildTuning(Method):
    """``w ← w − η·(g ⊙ M)`` with a mask M of a share ``reserve`` p of the entries.

    Variant ``D``: M is the top p by Σ g² over the ranking rows, in train mode and before the first
    step, over all parameters of the encoder's layers together, biases and norms included; all
    outside the layers trains. The paper takes the whole training set: raise ``ranking_rows`` for
    it. Frozen entries stay to the bit, which needs ``SubsetAdamW``; ``as_published`` masks the
    gradients alone, so that momentum and weight decay move frozen entries.

    Variant ``F``: M is drawn anew each step, Bernoulli(p), for every parameter, and ``g ⊙ M / p``
    takes the gradient's place. What is masked changes every step, so moments and decay go on as
    published, whatever ``as_published`` says.
    An accuracy method: it saves no FLOPs, and D adds a pass over the ranking rows.
    """

    name = "child-tuning"
    summary = "the entries with the largest gradients train (D), or others each step (F)"
    learning_rate = 4e-5
    needs_whole_gradients = True

    variant: str = option("D", "D: a fixed mask by squared gradients, F: a new mask every step")
    reserve: float = option(0.3, "share of the entries that trains")
    as_published: bool = option(False, "D: frozen entries drift by momentum and decay")
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_one_of(self.variant, "variant", VARIANTS)
        require(0 < self.reserve <= 1, "reserve", "a share in (0, 1]", self.reserve)

    def begin(self, run: Run) -> None:
        """Check that the optimizer can do what is asked."""
        if self._freezes:
            run.subset_adamw(_FREEZES)
        self._kept.clear()

    def begin_step(self, run: Run) -> None:
        """Choose the mask of D before the first step."""
        if self.variant == "D" and not self._kept:
            self._select(run)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Mask the gradients: F's, and D's as published."""
        if self.variant == "F":
            _mask_anew(run, self.reserve)
        elif self.as_published:
            for name, parameter in layer_parameters(run.model):
                if parameter.grad is not None:
                    parameter.grad.mul_(self._mask(name, parameter))

    def state(self) -> dict[str, Tensor]:
        """The bits of D's mask, by parameter; F has none."""
        return dict(self._kept)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Take the mask back."""
        self.begin(run)
        parameters = dict(layer_parameters(run.model))
        self._kept.update({n: bits.to(parameters[n].device) for n, bits in tensors.items()})
        self._freeze(run)

    @property
    def _freezes(self) -> bool:
        return self.variant == "D" and not self.as_published

    def _select(self, run: Run) -> None:
        sums = fisher(run)
        total = sum(value.numel() for value in sums.values())
        count = max(1, round(self.reserve * total))
        kept = select_elements(list(sums.values()), k=count, scope="global")
        self._kept.update({name: kept.packed(i).clone() for i, name in enumerate(sums)})
        self._freeze(run)
        grids = {name: kept.grid(i) for i, name in enumerate(sums)}
        run.plan = Plan(
            method=self.name,
            update_masks={
                name.removesuffix(".weight"): Mask.elements(grid)
                for name, grid in grids.items()
                if grid.ndim == 2
            },
            sequence_length=run.geometry.mean_length,
            origin=self.options() | {"entries": total, "kept": count},
        )
        run.events.append(f"step {run.step}: {count} of {total} entries of the layers train")

    def _freeze(self, run: Run) -> None:
        if not self._freezes:
            return
        optimizer = run.subset_adamw(_FREEZES)
        parameters = dict(layer_parameters(run.model))
        for name, bits in self._kept.items():
            optimizer.set_kept(parameters[name], ("elements", bits))

    def _mask(self, name: str, parameter: nn.Parameter) -> Tensor:
        return unpack_bits(self._kept[name], parameter.numel()).view(parameter.shape)


def layer_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the encoder's layers that trains, by name."""
    prefixes = tuple(f"{layer.prefix}." for layer in encoder_layers(model))
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) and parameter.requires_grad:
            yield name, parameter


def fisher(run: Run) -> dict[str, Tensor]:
    """Σ over ranking batches of the squared, clipped gradient, over their number; in train mode.

    float32 in each layer parameter's shape, by name; the same in all processes, each of which has
    whole batches. Raises UsageError: no batches, or no finite loss of one.
    """
    named = dict(layer_parameters(run.model))
    parameters, device = list(named.values()), next(run.model.parameters()).device
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    count = torch.zeros((), dtype=torch.float64)
    loss_of = checked_loss(run.compute_loss or own_loss)
    with modes_kept(run.model):
        run.model.train()
        for batch in run.batches():
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            loss = loss_of(run.model, moved)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                if grad is not None:
                    _add_square(total, grad)
            count += 1
    together = {"": count, **sums}
    run.world.sum_(together)
    batches = float(together.pop(""))
    require(batches > 0, "batches", "at least one batch", "none")
    return {name: value.to(device).div_(batches) for name, value in together.items()}


def _add_square(total: Tensor, grad: Tensor) -> None:
    """Add the square of ``grad`` clipped to a norm of ``MAX_NORM`` to ``total``."""
    wide = grad.float()
    scale = (MAX_NORM / (wide.norm() + 1e-6)).clamp(max=1.0)
    total.add_(wide.mul(scale).square_())


def _mask_anew(run: Run, share: float) -> None:
    """Keep each entry of every gradient with probability ``share``, and scale what is kept."""
    streams: dict[torch.device, torch.Generator] = {}
    for parameter in run.model.parameters():
        grad = parameter.grad
        if grad is None:
            continue
        if grad.device not in streams:
            streams[grad.device] = stream(grad.device, run.seed, run.step)
        if grad.is_sparse:  # an entry is drawn once, not once for every token
            grad = parameter.grad = grad.coalesce()
        values = grad.values() if grad.is_sparse else grad
        drawn = torch.empty_like(values, dtype=torch.float32)
        drawn.bernoulli_(share, generator=streams[grad.device])
        values.mul_(drawn.bool()).div_(share)
