"""S2FT: train whole heads and FFN neurons, the rest is frozen (Yang et al. 2024, 2412.06289)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import apply, encoder_layers, sensitivity, structure_of
from sensikernels.hf.layers import Layer
from sensikernels.masks import Mask, Plan, Scores
from sensikernels.masks.structure import Coupling, Member
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.parts import Parts, head_and_pooler, plan_of
from sensikernels.ops.select_kept import select_kept

SELECTIONS = ("random", "weight", "gradient")
SIDES = ("both", "rows", "columns")
_TILE = 16


def kept_count(units: int, share: float, multiple: int) -> int:
    """The multiple of ``multiple`` nearest to ``share`` of ``units``; one multiple at least."""
    return min(max(round(share * units / multiple), 1) * multiple, units)


@dataclass(kw_only=True, eq=False)
class S2FT(Method):
    """Train a few heads and neurons of every layer; their places are chosen once.

    Of a head its rows of the value's weight and its columns of the attention output's train, of a
    neuron its rows of the first and its columns of the second FFN linear. The authors permute
    weights until the chosen units are neighbours; kernels here take bands anywhere, so nothing is
    permuted. Weight gradients, their moments and, of columns, the kept input are those of the
    chosen part; forward and input gradients are whole. Biases, norms and embeddings are frozen,
    the head trains. Of one linear of query, key and value the value's third has the rows, and of a
    gated FFN both halves of a neuron.
    """

    name = "s2ft"
    summary = "a few whole heads and neurons train, the rest is frozen"
    learning_rate = 2e-4
    needs_whole_gradients = True

    share: float = option(0.1, "share of the heads and neurons of every layer that trains")
    selection: str = option("random", f"how they are chosen: {', '.join(SELECTIONS)}")
    sides: str = option("both", f"what of them trains: {', '.join(SIDES)}")

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", "a share in (0, 1]", self.share)
        require_one_of(self.selection, "selection", SELECTIONS)
        require_one_of(self.sides, "sides", SIDES)

    def begin(self, run: Run) -> None:
        """Choose and freeze before the first step."""
        scores = self._scores(run)
        run.plan = run.world.agree(lambda: self._plan(run, scores))
        self._apply(run)
        heads, neurons = (
            sum(self._count(c) for c in scores.structure.couplings if (c.kind == "heads") == wanted)
            for wanted in (True, False)
        )
        run.events.append(
            f"step 0: {heads} heads and {neurons} neurons train, chosen by {self.selection}"
        )

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """The plan says what trains."""
        self._apply(run)

    def _apply(self, run: Run) -> None:
        assert run.plan is not None
        apply(run.model, run.plan, optimizer=run.optimizer)

    def _scores(self, run: Run) -> Scores:
        if self.selection == "weight":
            return sensitivity(run.model, (), "magnitude")
        if self.selection == "gradient":
            return sensitivity(run.model, run.batches(), compute_loss=run.compute_loss)
        structure = structure_of(run.model)
        flat = Scores(
            structure=structure,
            values={c.name: torch.ones(c.units) for c in structure.couplings},
            criterion="none",
            statistic="none",
        )
        return flat.random(run.seed)

    def _count(self, coupling: Coupling) -> int:
        return kept_count(coupling.units, self.share, 1 if coupling.kind == "heads" else _TILE)

    def _plan(self, run: Run, scores: Scores) -> Plan:
        layers = {layer.index: layer for layer in encoder_layers(run.model)}
        masks: dict[str, Mask] = {}
        for coupling in scores.structure.couplings:
            kept = select_kept(scores.values[coupling.name], k=self._count(coupling)).bits.cpu()
            for member in coupling.members:
                grid = self._grid(layers[coupling.layer], coupling, member, kept)
                if grid is not None:
                    masks[member.module] = _bands(member, coupling.unit_size, grid)
        shares = {name: mask.density for name, mask in masks.items()}
        weights = (f"{name}.weight" for name in masks)
        return plan_of(
            run,
            self.name,
            Parts(whole=head_and_pooler(run.model), shares=shares),
            update_masks=masks,
            trainable=(*weights, *head_and_pooler(run.model)),
            shapes=scores.structure.shapes(),
            origin=self.options(),
        )

    def _grid(
        self, layer: Layer, coupling: Coupling, member: Member, kept: Tensor
    ) -> Tensor | None:
        """bool, a band each: what trains of a linear; None if nothing does."""
        if (member.axis == 0) == (self.sides == "columns") and self.sides != "both":
            return None
        if member.axis == 1 or coupling.kind == "neurons":
            return kept.repeat(member.repeats)
        if layer.has("value"):
            return kept if member.module == layer.name("value") else None
        earlier = torch.zeros_like(kept).repeat(member.repeats - 1)
        return torch.cat([earlier, kept])  # the value comes last in a linear of all three


def _bands(member: Member, size: int, grid: Tensor) -> Mask:
    if member.axis == 0:
        return Mask.rows(grid, member.shape, height=size)
    return Mask.columns(grid, member.shape, width=size)
