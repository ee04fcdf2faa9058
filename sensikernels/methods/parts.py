"""What methods share that train a small part of the encoder: the head's names, and costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sensikernels._core.checks import require
from sensikernels.hf import below_layers, encoder_layers, family_of, structure_of
from sensikernels.hf.layers import Layer
from sensikernels.masks import Plan, Structure
from sensikernels.masks.structure import TRAIN_FACTOR
from sensikernels.methods.base import Run

_ATTENTION_OUT, _FFN_IN, _FFN_OUT = "attention_output", "intermediate", "output"
_ON_EVERY_TOKEN = ("key", "value", "query_key_value")
"""Roles that run on every token where the last layer's queries ask on first tokens alone."""


def head_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the task's head: the classifier, and the pooler under it."""
    family = family_of(model)
    names = (name for name, _ in model.named_parameters())
    return tuple(n for n in names if n.startswith(family.heads) or family.pooler in n.split("."))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What trains of the encoder's linears, by module name.

    ``shares``: the trained share of a weight; ``ranks``: the rank of an adapter beside it.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)


def plan_of(run: Run, method: str, parts: Parts, **named: Any) -> Plan:
    """A plan of ``method`` under which ``parts`` and the head train; ``named``: its other fields.

    FLOPs are those of the whole forward, of the input gradients down to the lowest trained linear,
    and of the weight gradients of what trains.
    """
    raw = structure_of(run.model)
    structure, length = raw.at(run.geometry), run.geometry.mean_length
    return Plan(
        method=method,
        sequence_length=length,
        flops_dense=structure.flops(length),
        flops_planned=_flops(run, raw, structure, parts),
        params_dense=structure.params(),
        params_planned=structure.params(),
        **named,
    )


def linears_of(model: nn.Module, roles: tuple[str, ...]) -> dict[str, Any]:
    """The encoder's linears of these roles by module name, lowest layer first.

    Raises UsageError where the family has a role not at all, or none is named.
    """
    family = family_of(model)
    known = f"some of {', '.join(family.linears)} for {family.title}"
    strange = [role for role in roles if role not in family.linears]
    require(bool(roles) and not strange, "roles", known, ", ".join(strange) or "none")
    return {
        layer.name(role): layer.linear(role)
        for layer in encoder_layers(model)
        for role in roles
        if layer.has(role)
    }


def _flops(run: Run, raw: Structure, structure: Structure, parts: Parts) -> float:
    """Training FLOPs per token where embeddings are frozen and ``parts`` and the head train."""
    length = run.geometry.mean_length
    forward = _forward_flops(run, raw)
    total, reached = structure.fixed_flops(length) - _spared_below(run.model), False
    for layer in encoder_layers(run.model):
        mine = [c for c in structure.couplings if c.layer == layer.index]
        attention = sum((c.flops(length) / TRAIN_FACTOR - c.linear(length)) * c.units for c in mine)
        outputs = {layer.name(role) for role in (_ATTENTION_OUT, _FFN_IN, _FFN_OUT)}
        readers = [n for n in forward if _inside(n, layer) and n not in outputs]
        total += sum(_linear_flops(forward, name, parts, reached) for name in readers)
        reached = reached or any(_trains(name, parts) for name in readers)
        total += attention * (TRAIN_FACTOR if reached else 1)
        for name in (layer.name(role) for role in (_ATTENTION_OUT, _FFN_IN, _FFN_OUT)):
            total += _linear_flops(forward, name, parts, reached)
            reached = reached or _trains(name, parts)
    return total


def _spared_below(model: nn.Module) -> float:
    """FLOPs per token of the gradients of linears under the layers, as between narrow tables."""
    below = below_layers(model)
    linears = (m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n in below)
    return sum((TRAIN_FACTOR - 1) * 2 * m.in_features * m.out_features for m in linears)


def _linear_flops(
    forward: Mapping[str, tuple[float, int, int]], name: str, parts: Parts, reached: bool
) -> float:
    """FLOPs of one linear and its adapter; ``reached``: its input has a gradient."""
    rows_per_token, out, into = forward[name]
    weight, rank = 2 * out * into, parts.ranks.get(name, 0)
    adapter = 2 * 2 * rank * (out + into) + 2 * rank * (out + into * reached)
    return rows_per_token * (weight * (1 + reached + parts.shares.get(name, 0.0)) + adapter)


def _trains(name: str, parts: Parts) -> bool:
    return parts.shares.get(name, 0.0) > 0 or parts.ranks.get(name, 0) > 0


def _inside(name: str, layer: Layer) -> bool:
    return name.startswith(f"{layer.prefix}.")


def _forward_flops(run: Run, raw: Structure) -> dict[str, tuple[float, int, int]]:
    """Rows that each linear computes per token of the batch, and its weight's shape."""
    layers = {layer.index: layer for layer in encoder_layers(run.model)}
    found: dict[str, tuple[float, int, int]] = {}
    for coupling in raw.couplings:
        layer = layers[coupling.layer]
        every = {layer.name(role) for role in _ON_EVERY_TOKEN if layer.has(role)}
        tables = {layer.name(role) for role in layer.family.optional if layer.has(role)}
        for member in coupling.members:
            once = coupling.sequence_flops > 0 and member.module not in every
            rows = 1 / run.geometry.tokens_per_sequence if once else 1.0
            found[member.module] = (0.0 if member.module in tables else rows, *member.shape)
    return found
