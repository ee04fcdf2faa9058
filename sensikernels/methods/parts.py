"""What methods share that train a part of some weights: linears by role, the head, costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sensikernels._core.checks import require
from sensikernels.hf import encoder_layers, family_of, structure_of
from sensikernels.hf.trained_flops import TrainedFlops
from sensikernels.masks import Plan
from sensikernels.methods.base import Run

_THREE, _JOINED = ("query", "key", "value"), "query_key_value"


def head_and_pooler(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the task's head: the classifier, and the pooler under it."""
    family = family_of(model)
    names = (name for name, _ in model.named_parameters())
    return tuple(n for n in names if n.startswith(family.heads) or family.pooler in n.split("."))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What trains: parameters as a whole, and by module name what trains of linears.

    ``shares``: the share of a weight whose gradient is computed; ``ranks``: the rank of an adapter
    beside it.
    """

    whole: Iterable[str] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)


def plan_of(run: Run, method: str, parts: Parts, **named: Any) -> Plan:
    """A plan of ``method`` under which ``parts`` train; ``named``: its other fields.

    Call it before layers are swapped: costs are those of the model as it is.
    """
    structure, length = structure_of(run.model).at(run.geometry), run.geometry.mean_length
    flops = TrainedFlops.of(run.model, run.geometry).total(
        parts.whole,
        shares={f"{name}.weight": share for name, share in parts.shares.items()},
        ranks={f"{name}.weight": rank for name, rank in parts.ranks.items()},
    )
    return Plan(
        method=method,
        sequence_length=length,
        flops_dense=structure.flops(length),
        flops_planned=flops,
        params_dense=structure.params(),
        params_planned=structure.params(),
        **named,
    )


def linears_of(model: nn.Module, roles: Sequence[str]) -> dict[str, Any]:
    """The encoder's linears of these roles by module name, lowest layer first.

    Where a family has one linear of query, key and value it stands for all three.

    Raises:
        UsageError: the family has no linear of a role, or one of the three that are not all asked
            for; no role is named.
    """
    family, wanted = family_of(model), list(roles)
    if _JOINED in family.linears:
        three = [role for role in _THREE if role in wanted]
        whole = f"query, key and value together for {family.title}"
        require(len(three) in (0, 3), "roles", whole, ", ".join(three))
        if three:
            wanted = [_JOINED, *(role for role in wanted if role not in three)]
    known = f"some of {', '.join(family.linears)} for {family.title}"
    strange = [role for role in wanted if role not in family.linears]
    require(bool(wanted) and not strange, "roles", known, ", ".join(strange) or "none")
    return {
        layer.name(role): layer.linear(role)
        for layer in encoder_layers(model)
        for role in wanted
        if layer.has(role)
    }
