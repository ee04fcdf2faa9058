"""DSEE: adapters of low rank, a few entries of W, and a pruned W (Chen et al., 2111.00160)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import apply, encoder_layers, restore
from sensikernels.hf.adapters import BASE, deltas, merge_lora
from sensikernels.masks import Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.lora import adapt, check_adapters
from sensikernels.methods.parts import Parts, head_and_pooler, linears_of, plan_of
from sensikernels.nn import SelectiveLinear
from sensikernels.ops.select_kept import select_elements

POSITIONS = ("largest", "random")


@dataclass(kw_only=True, eq=False)
class DSEE(Method):
    """Train ``W + (alpha/rank) · B A + S`` on the linears of ``roles``; S has ``sparse`` entries.

    S is trained in W itself, without the factor of B A: its entries are those of largest |W|, or
    random ones; their gradient is taken from the whole one of W. At ``prune_at`` of the steps the
    ``pruning`` share of all encoder weights becomes zero in W, those of smallest
    |W + (alpha/rank) · B A| in the whole model; B A, S and the head train on. An entry of S is
    never pruned. The head trains, all else is frozen. A dense device computes as before: zeros save
    no time, and what is saved is W + (alpha/rank) · B A, which is dense where adapters are.
    """

    name = "dsee"
    summary = "adapters and a few entries of W train, half of W is pruned on the way"
    learning_rate = 2e-4
    needs_whole_gradients = True

    rank: int = option(16, "rank of every adapter")
    alpha: float = option(16.0, "adapters are scaled by alpha / rank")
    dropout: float = option(0.0, "dropout of what adapters read")
    roles: Sequence[str] = option(("query", "value"), "linears that get an adapter and S")
    sparse: int = option(64, "entries of S in each of them; 0: none")
    positions: str = option("largest", f"where they are: {', '.join(POSITIONS)} of W")
    pruning: float = option(0.5, "share of the encoder's weights that is pruned; 0: none")
    prune_at: float = option(0.5, "when, as a share of the steps")

    def __post_init__(self) -> None:
        check_adapters(self.rank, self.alpha, self.dropout)
        ok = type(self.sparse) is int and self.sparse >= 0
        require(ok, "sparse", "a whole number of at least 0", self.sparse)
        require_one_of(self.positions, "positions", POSITIONS)
        require(0 <= self.pruning < 1, "pruning", "a share in [0, 1)", self.pruning)
        require(0 <= self.prune_at < 1, "prune_at", "a share of the steps in [0, 1)", self.prune_at)
        self.roles = tuple(self.roles)

    def begin(self, run: Run) -> None:
        """Put adapters in, choose the entries of S and freeze the rest before the first step."""
        linears = linears_of(run.model, tuple(self.roles))
        smallest = min(linear.weight.numel() for linear in linears.values())
        require(self.sparse <= smallest, "sparse", f"at most {smallest} entries", self.sparse)
        free = 1 - self.sparse * len(linears) / sum(w.numel() for w in _weights(run).values())
        require(self.pruning <= free, "pruning", f"at most {free:.4g}, as S stays", self.pruning)
        self._prepare(run, self._places(run, linears))
        run.events.append(
            f"step 0: {len(linears)} adapters of rank {self.rank} train, and {self.sparse} entries "
            "of each weight"
        )

    def begin_step(self, run: Run) -> None:
        """Prune when the moment has come."""
        if self.pruning > 0 and run.step == self._moment(run):
            self._prune(run)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """The plan says where S is; weights, pruned or not, come with the model's."""
        assert run.plan is not None
        masks = run.plan.update_masks.items()
        self._prepare(run, {name.removesuffix(f".{BASE}"): mask for name, mask in masks})

    def settled(self, run: Run) -> bool:
        """Not before it is pruned."""
        return self.pruning == 0 or run.step >= self._moment(run)

    def shape(self, model: nn.Module, plan: Plan) -> None:
        """Adapters first: the plan names them."""
        adapt(self, model, seed=0)
        super().shape(model, plan)

    def end(self, run: Run) -> None:
        """Merge S and the adapters, so that the model is a plain one."""
        restore(run.model, optimizer=run.optimizer)
        merge_lora(run.model)

    def _moment(self, run: Run) -> int:
        return int(self.prune_at * run.max_steps)

    @torch.no_grad()
    def _places(self, run: Run, linears: Mapping[str, Any]) -> dict[str, Mask]:
        if self.sparse == 0:
            return {}
        weights = [linear.weight.detach() for linear in linears.values()]
        if self.positions == "random":
            generator = torch.Generator().manual_seed(run.seed)
            weights = [torch.rand(w.shape, generator=generator) for w in weights]
        kept = select_elements(weights, k=self.sparse, score="abs_value", scope="per_tensor")
        return {name: Mask.elements(kept.grid(i).cpu()) for i, name in enumerate(linears)}

    def _prepare(self, run: Run, places: Mapping[str, Mask]) -> None:
        names = tuple(linears_of(run.model, tuple(self.roles)))
        # Single entries take a dense gradient, of which theirs stay.
        whole = dict.fromkeys(places, 1.0)
        head = head_and_pooler(run.model)
        parts = Parts(whole=head, shares=whole, ranks=dict.fromkeys(names, self.rank))
        plan = plan_of(run, self.name, parts, origin=self.options() | {"roles": [*self.roles]})
        added = adapt(self, run.model, seed=run.seed)
        run.plan = replace(
            plan,
            update_masks={f"{name}.{BASE}": mask for name, mask in places.items()},
            trainable=(*added, *(f"{name}.{BASE}.weight" for name in places), *head),
        )
        apply(run.model, run.plan, optimizer=run.optimizer)

    @torch.no_grad()
    def _prune(self, run: Run) -> None:
        """Zero the smallest entries of W; every process has the same weights and finds the same."""
        assert run.plan is not None
        weights, added = _weights(run), deltas(run.model)
        scores = [w.float() + added[n] if n in added else w.float() for n, w in weights.items()]
        for score, name in zip(scores, weights, strict=True):
            trained = run.plan.update_masks.get(f"{name}.{BASE}")
            if trained is not None:
                score[trained.grid.to(score.device)] = torch.inf
        total = sum(score.numel() for score in scores)
        gone = round(self.pruning * total)
        kept = select_elements(scores, k=total - gone, score="abs_value", scope="global")
        for index, weight in enumerate(weights.values()):
            weight.masked_fill_(~kept.grid(index), 0.0)
        run.events.append(f"step {run.step}: {gone} of {total} encoder weights pruned")


def _weights(run: Run) -> dict[str, Tensor]:
    """W of every encoder linear that runs on tokens, by the name it has without adapters."""
    found: dict[str, Tensor] = {}
    for layer in encoder_layers(run.model):
        for role in layer.family.linears:
            if role in layer.family.optional or not layer.has(role):
                continue
            outer: Any = layer.linear(role)
            linear = getattr(outer, BASE, outer)
            if isinstance(linear, SelectiveLinear):
                linear.refresh()
            found[layer.name(role)] = linear.weight
    return found
