"""SIFT: the entries with the largest gradients of the first step train (arXiv 2312.11875)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.bits import unpack_bits
from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import apply, encoder_layers, packing_of, structure_of
from sensikernels.masks import Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.nn import SelectiveLinear
from sensikernels.ops.select_kept import select_elements

ROLES = ("query", "key", "value", "attention_output", "intermediate", "output")
_JOINED = "query_key_value"


@dataclass(kw_only=True, eq=False)
class SIFT(Method):
    """Of each linear of ``roles`` the ``int(share·N) + 1`` entries with the largest |g| train.

    g is the gradient of the first step, whose update is left out, as in the authors' code. From the
    second step on these entries and the task's head train; everything else stays to the bit. The
    head is all that lies outside the encoder. Weight decay leaves the entries alone, as the authors
    decay the increments, which are nearly zero; the head's weights, in the same group, go without.

    A family with one linear of query, key and value takes the three as one matrix. Saved are
    optimizer state and traffic between processes of what is frozen, and the weight gradients of
    linears that are not chosen; chosen linears take a dense gradient first. The first step costs
    a whole one.
    """

    name = "sift"
    summary = "the entries with the largest gradients of the first step train, and the head"
    learning_rate = 7e-5
    needs_whole_gradients = True

    share: float = option(0.008, "share of each chosen matrix that trains")
    roles: Sequence[str] = option(ROLES[:4], f"linears that train a share: {', '.join(ROLES)}")
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", "a share in (0, 1)", self.share)
        require(len(self.roles) > 0, "roles", "at least one", "none")
        for role in self.roles:
            require_one_of(role, "roles", ROLES)
        self.roles = tuple(dict.fromkeys(self.roles))

    def begin(self, run: Run) -> None:
        """Check that the model has the linears."""
        linears_of(run.model, self.roles)
        self._kept.clear()

    def begin_step(self, run: Run) -> None:
        """Swap the chosen linears once the entries are known."""
        if run.plan is None and self._kept:
            run.plan = run.world.agree(lambda: self._plan(run))
            self._apply(run, run.plan)
            kept = sum(mask.kept_entries for mask in run.plan.update_masks.values())
            matrices = len(run.plan.update_masks)
            run.events.append(f"step {run.step}: {kept} entries of {matrices} matrices train")
            self._kept.clear()

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Choose the entries by the first gradients, and drop these."""
        if run.plan is not None:
            return
        weights = linears_of(run.model, self.roles)
        grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
        require(len(grads) == len(weights), "roles", "linears with a gradient", "one without")
        counts = [kept_count(grad.numel(), self.share) for grad in grads.values()]
        kept = select_elements(
            list(grads.values()), k=counts, score="abs_value", scope="per_tensor"
        )
        self._kept.update({name: kept.packed(i).clone() for i, name in enumerate(grads)})
        for parameter in run.model.parameters():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The bits of the entries, between the first step and the second."""
        return dict(self._kept)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Swap the linears again, or know again what to swap."""
        self.begin(run)
        self._kept.update(tensors)
        if run.plan is not None:
            self._apply(run, run.plan)

    def needs_eager(self) -> str | None:
        """The first step alone reads gradients; it cannot be told apart in a captured one."""
        return "sift reads the gradients of the first step"

    def _plan(self, run: Run) -> Plan:
        model, length = run.model, run.geometry.mean_length
        structure = structure_of(model).at(run.geometry)
        weights = linears_of(model, self.roles)
        dense = structure.flops(length)
        # The lowest layer's input needs no gradient, as nothing below trains.
        read = dense - structure.flops_above(length, 0)
        planned = structure.forward_and_input_flops(length) - read + _gradient_flops(run, weights)
        return Plan(
            method=self.name,
            update_masks={
                name: Mask.elements(
                    unpack_bits(self._kept[name], weight.numel()).view(weight.shape)
                )
                for name, weight in weights.items()
            },
            trainable=(*(f"{name}.weight" for name in weights), *head_parameters(model)),
            sequence_length=length,
            flops_dense=dense,
            flops_planned=planned,
            params_dense=structure.params(),
            params_planned=structure.params(),
            shapes=structure.shapes(),
            origin={"share": self.share, "roles": list(self.roles), "step": run.step},
        )

    def _apply(self, run: Run, plan: Plan) -> None:
        apply(run.model, plan, optimizer=run.optimizer)
        _stop_decay(run, plan)


def kept_count(entries: int, share: float) -> int:
    """Entries of a matrix that train: ``int(share·N) + 1``, all of them at most."""
    return min(int(share * entries) + 1, entries)


def linears_of(model: nn.Module, roles: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights of the linears of ``roles`` in every layer, by module name.

    Raises UsageError where the family has one linear of query, key and value and not all three
    are asked for, or has no linear of a role.
    """
    layers = encoder_layers(model)
    family = layers[0].family
    wanted = list(roles)
    if _JOINED in family.linears:
        three = [role for role in ROLES[:3] if role in wanted]
        whole = f"query, key and value together for {family.title}"
        require(len(three) in (0, 3), "roles", whole, ", ".join(three))
        if three:
            wanted = [_JOINED, *(role for role in wanted if role not in three)]
    for role in wanted:
        known = f"one of {', '.join(family.linears)} for {family.title}"
        require(role in family.linears, "roles", known, role)
    linears: dict[str, Any] = {
        layer.name(role): layer.linear(role) for layer in layers for role in wanted
    }
    return {name: linear.weight for name, linear in linears.items()}


def head_parameters(model: nn.Module) -> Iterator[str]:
    """Names of the parameters outside the encoder."""
    layer = encoder_layers(model)[0]
    root = layer.prefix.removesuffix(f"{layer.family.layers}.0")
    return (name for name, _ in model.named_parameters() if not name.startswith(root))


def _gradient_flops(run: Run, weights: Mapping[str, Tensor]) -> float:
    """FLOPs per token of the dense gradients of ``weights``."""
    layers, packing = encoder_layers(run.model), packing_of(run.model)
    total = 0.0
    for name, weight in weights.items():
        layer = next(one for one in layers if name.startswith(f"{one.prefix}."))
        keys = [layer.name(role) for role in (*ROLES[1:3], _JOINED) if layer.has(role)]
        first_tokens = packing is not None and packing.cls_only and layer is layers[-1]
        once = first_tokens and name not in keys
        total += 2 * weight.numel() / (run.geometry.tokens_per_sequence if once else 1)
    return total


def _stop_decay(run: Run, plan: Plan) -> None:
    """Let no group that holds chosen entries decay."""
    modules = (run.model.get_submodule(name) for name in plan.update_masks)
    chosen = {id(m.values) for m in modules if isinstance(m, SelectiveLinear)}
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    for group in optimizer.param_groups:
        if any(id(parameter) in chosen for parameter in group["params"]):
            group["weight_decay"] = 0.0
