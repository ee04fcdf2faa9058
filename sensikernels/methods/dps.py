"""DPS: train all entries, and those with the largest gradients, in turn (arXiv 2211.01642)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sensikernels._core.bits import unpack_bits
from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import encoder_layers, head_linears
from sensikernels.masks import Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.dps_mix import Mix
from sensikernels.ops.select_kept import select_elements

VARIANTS = ("dense", "mix")
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

    Variant ``mix``: stage 1 computes with ``mixed`` weights, drawn anew each step between the
    present and the pre-trained ones, by columns, and drawn columns alone have gradients. Stage 2
    as published goes on mixing, with the weights at its beginning and the factor 1 / (1 − p)
    although its mask is not random; without ``as_published`` that factor has nothing to make up
    for, and masked entries are what they would be mixed with, so it computes with the weights.
    An accuracy method: it saves no FLOPs (methods' costs: README).
    """

    name = "dps"
    summary = "stages of full updates and of updates to the entries with the largest gradients"
    learning_rate = 2e-5
    needs_whole_gradients = True

    variant: str = option("dense", "dense, or mix: stage 1 mixes in pre-trained columns")
    masked_share: float = option(0.3, "share of every matrix that stage 2 freezes")
    update_ratio: float = option(0.05, "length of a stage as a share of the steps")
    as_published: bool = option(False, "frozen entries drift by momentum and decay, as published")
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _mix: Mix | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        share, ratio = self.masked_share, self.update_ratio
        require_one_of(self.variant, "variant", VARIANTS)
        require(0 <= share < 1, "masked_share", "a share in [0, 1)", share)
        require(0 < ratio <= 0.5, "update_ratio", "a share in (0, 0.5]", ratio)
        self._mix = Mix(share=share) if self.variant == "mix" else None

    def begin(self, run: Run) -> None:
        """Check that the optimizer can do what is asked; the weights are the pre-trained ones."""
        if not self.as_published:
            run.subset_adamw("dps without as_published")
        self._sums.clear()
        if self._mix is not None:
            self._mix.seen.clear()
            self._mix.start = {n: w.detach().clone() for n, w in matrices(run.model).items()}

    @torch.no_grad()
    def begin_step(self, run: Run) -> None:
        """Mix the weights that the step computes with."""
        mix = self._mix
        if mix is None:
            return
        mix.take_back()
        weights = matrices(run.model)
        if self._enter(run, weights) == 1:
            mix.put(run.model, weights, mix.start, mix.draw(run, weights))
        elif self.as_published and self._kept:
            masks = {name: self._mask(name, weights[name]) for name in self._kept}
            chosen = {name: weights[name] for name in masks}
            mix.put(run.model, chosen, mix.target, masks)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Accumulate in stage 1, select at its end, mask in stage 2."""
        mix, weights = self._mix, matrices(run.model)
        if mix is not None:
            mix.take_back()
        if self._enter(run, weights) == 1:
            if mix is not None:
                mix.count(weights)
            for name, weight in weights.items():
                self._accumulate(name, weight)
            return
        self._tell(run, weights)
        if self.as_published:
            for name in self._kept:
                weight = weights[name]
                if weight.grad is not None:
                    weight.grad.mul_(self._mask(name, weight))

    def end(self, run: Run) -> None:
        """Put raw weights back, where the last step's gradients overflowed."""
        if self._mix is not None:
            self._mix.take_back()

    def state(self) -> dict[str, Tensor]:
        """The sums and masks of the stage under way; of Mix, what it mixes with and its counts."""
        return {
            f"{kind}.{name}": value
            for kind, values in self._held().items()
            for name, value in values.items()
        }

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Take the sums and masks back, and tell the optimizer which entries are frozen."""
        self.begin(run)
        weights, held = matrices(run.model), self._held()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            held[kind][name] = value.to(weights[name].device)
        for name, kept in self._kept.items():
            self._freeze(run, weights[name], kept)

    def _held(self) -> dict[str, dict[str, Tensor]]:
        mix = self._mix
        own = {"sum": self._sums, "kept": self._kept}
        return (
            own
            if mix is None
            else own | {"start": mix.start, "target": mix.target, "seen": mix.seen}
        )

    def _enter(self, run: Run, weights: Mapping[str, nn.Parameter]) -> int:
        """The stage of the coming step. What it begins with is done once, at whatever step:
        one whose gradients overflow in fp16 does not get here."""
        length = stage_length(run.max_steps, self.update_ratio)
        stage = stage_of(run.step + 1, length)
        if stage == 1 and self._kept:
            self._open(run, weights)
        elif stage == 2 and self._sums:
            self._select(run, weights, length)
        return stage

    def _open(self, run: Run, weights: Mapping[str, nn.Parameter]) -> None:
        for name in self._kept:
            self._freeze(run, weights[name], None)
        self._kept.clear()
        if self._mix is not None:
            self._mix.target.clear()

    def _accumulate(self, name: str, weight: nn.Parameter) -> None:
        if weight.grad is None:
            return
        square = weight.grad.float().square().div_(_SCALE)
        if name in self._sums:
            self._sums[name] += square
        else:
            self._sums[name] = square

    def _select(self, run: Run, weights: Mapping[str, nn.Parameter], length: int) -> None:
        mix, names = self._mix, [name for name in weights if name in self._sums]
        sums = [self._sums[name] for name in names]
        if mix is not None:
            pairs = zip(names, sums, strict=True)
            sums = [mix.scores(name, value, length) for name, value in pairs]
            mix.seen.clear()
            if self.as_published:
                mix.target.update({name: weights[name].detach().clone() for name in names})
        counts = [kept_count(weights[name].numel(), self.masked_share) for name in names]
        kept = select_elements(sums, k=counts, scope="per_tensor")
        self._sums.clear()
        for index, name in enumerate(names):
            self._kept[name] = kept.packed(index).clone()
            self._freeze(run, weights[name], self._kept[name])

    def _tell(self, run: Run, weights: Mapping[str, nn.Parameter]) -> None:
        """Make the plan of the stage, once, after the step's forward: no layer is swapped."""
        length = stage_length(run.max_steps, self.update_ratio)
        since = run.step - run.step % length
        told = run.plan is not None and run.plan.origin["step"] >= since
        if told or not self._kept:
            return
        run.plan = Plan(
            method=self.name,
            update_masks={
                name.removesuffix(".weight"): Mask.elements(self._mask(name, weights[name]))
                for name in self._kept
            },
            sequence_length=run.geometry.mean_length,
            origin=self.options() | {"step": run.step},
        )

    def _mask(self, name: str, weight: nn.Parameter) -> Tensor:
        return unpack_bits(self._kept[name], weight.numel()).view(weight.shape)

    def _freeze(self, run: Run, weight: nn.Parameter, kept: Tensor | None) -> None:
        if self.as_published:
            return
        optimizer = run.subset_adamw("dps without as_published")
        optimizer.set_kept(weight, None if kept is None else ("elements", kept))


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights DPS masks: encoder linears, pooler and classifier, by parameter name."""
    layers = encoder_layers(model)
    inside = {layer.name(role) for layer in layers for role in layer.family.linears}
    inside |= set(head_linears(model))
    return {
        f"{name}.weight": module.weight for name, module in model.named_modules() if name in inside
    }
