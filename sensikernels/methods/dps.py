"""DPS Dense: train all entries, and those with the largest gradients, in turn (2211.01642)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sensikernels._core.bits import unpack_bits
from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels.hf import encoder_layers, head_linears
from sensikernels.masks import Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.ops.select_kept import select_elements
from sensikernels.optim import SubsetAdamW

_SCALE = 1000.0  # the published code divides g² by it; it only rescales


def stage_length(max_steps: int, update_ratio: float) -> int:
    """Steps of one stage: ``int(max_steps · update_ratio)``, at least one."""
    return max(int(max_steps * update_ratio), 1)


def stage_of(step: int, length: int) -> int:
    """1 or 2 for the 1-based training step: stage 1 where ⌈step / length⌉ is odd."""
    return 1 if math.ceil(step / length) % 2 else 2


def kept_count(entries: int, masked_share: float) -> int:
    """Entries of a matrix that train in stage 2: ⌈N·(1 − p)⌉."""
    return math.ceil(entries * (1 - masked_share))


@dataclass(kw_only=True, eq=False)
class DPS(Method):
    """Stage 1 updates all and sums g² per entry; stage 2 trains each matrix's top entries.

    ``masked_share`` is p, the share of every weight matrix masked out in stage 2 (published: 0.3);
    ``update_ratio`` the length of a stage as a share of the run. Applies to the encoder's linears,
    the pooler and the classifier, never to biases, LayerNorm or embeddings. ``as_published``
    multiplies gradients by the mask, so that masked entries drift by momentum and decay as in the
    authors' code; without it they are frozen to the bit, which needs ``SubsetAdamW``.
    An accuracy method: it saves no FLOPs (methods' costs: README).
    """

    name = "dps"
    summary = "stages of full updates and of updates to the entries with the largest gradients"
    learning_rate = 2e-5
    needs_whole_gradients = True

    masked_share: float = option(0.3, "share of every matrix that stage 2 freezes")
    update_ratio: float = option(0.05, "length of a stage as a share of the steps")
    as_published: bool = option(False, "frozen entries drift by momentum and decay, as published")
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        share, ratio = self.masked_share, self.update_ratio
        require(0 <= share < 1, "masked_share", "a share in [0, 1)", share)
        require(0 < ratio <= 0.5, "update_ratio", "a share in (0, 0.5]", ratio)

    def begin(self, run: Run) -> None:
        """Check that the optimizer can do what is asked."""
        if not self.as_published and not isinstance(_inner(run), SubsetAdamW):
            raise UsageError(
                "optimizer: expected SubsetAdamW for dps without as_published, got "
                f"{type(_inner(run)).__name__}"
            )

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Accumulate in stage 1, select at its end, mask in stage 2."""
        length = stage_length(run.max_steps, self.update_ratio)
        step = run.step + 1
        first = (step - 1) % length == 0
        weights = matrices(run.model)
        if stage_of(step, length) == 1:
            if first:
                self._open(run, weights)
            for name, weight in weights.items():
                self._accumulate(name, weight)
            return
        if first:
            self._select(run, weights)
        if self.as_published:
            for name, weight in weights.items():
                if weight.grad is not None:
                    kept = unpack_bits(self._kept[name], weight.numel())
                    weight.grad.mul_(kept.view(weight.shape))

    def state(self) -> dict[str, Tensor]:
        """The sums and masks of the stage under way."""
        sums = {f"sum.{name}": value for name, value in self._sums.items()}
        return sums | {f"kept.{name}": value for name, value in self._kept.items()}

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Take the sums and masks back, and tell the optimizer which entries are frozen."""
        self.begin(run)
        weights = matrices(run.model)
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            (self._sums if kind == "sum" else self._kept)[name] = value
        for name, kept in self._kept.items():
            self._freeze(run, weights[name], kept)

    def _open(self, run: Run, weights: Mapping[str, nn.Parameter]) -> None:
        self._sums.clear()
        for name in self._kept:
            self._freeze(run, weights[name], None)
        self._kept.clear()

    def _accumulate(self, name: str, weight: nn.Parameter) -> None:
        if weight.grad is None:
            return
        square = weight.grad.float().square().div_(_SCALE)
        if name in self._sums:
            self._sums[name] += square
        else:
            self._sums[name] = square

    def _select(self, run: Run, weights: Mapping[str, nn.Parameter]) -> None:
        sums = [self._sums[name] for name in weights]
        counts = [kept_count(weight.numel(), self.masked_share) for weight in weights.values()]
        kept = select_elements(sums, k=counts, scope="per_tensor")
        self._sums.clear()
        for index, (name, weight) in enumerate(weights.items()):
            self._kept[name] = kept.packed(index).clone()
            self._freeze(run, weight, self._kept[name])
        grids = {n.removesuffix(".weight"): kept.grid(i) for i, n in enumerate(weights)}
        run.plan = Plan(
            method=self.name,
            update_masks={name: Mask.elements(grid) for name, grid in grids.items()},
            sequence_length=run.geometry.mean_length,
            origin=self.options() | {"step": run.step},
        )

    def _freeze(self, run: Run, weight: nn.Parameter, kept: Tensor | None) -> None:
        if self.as_published:
            return
        optimizer = _inner(run)
        assert isinstance(optimizer, SubsetAdamW)
        optimizer.set_kept(weight, None if kept is None else ("elements", kept))


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights DPS masks: encoder linears, pooler and classifier, by parameter name."""
    layers = encoder_layers(model)
    inside = {layer.name(role) for layer in layers for role in layer.family.linears}
    inside |= set(head_linears(model))
    return {
        f"{name}.weight": module.weight for name, module in model.named_modules() if name in inside
    }


def _inner(run: Run) -> object:
    return getattr(run.optimizer, "optimizer", run.optimizer)
