"""The units of a model that can be trimmed, and the cost of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf.family import SIX_LINEARS, Couples, Family, stock_class
from sensikernels.hf.layers import Layer, encoder_layers, family_of
from sensikernels.hf.packed.step import packing_of
from sensikernels.masks.plans import Plan
from sensikernels.masks.structure import Coupling, Member, Structure

GRANULARITIES = tuple(SIX_LINEARS)


def structure_of(model: nn.Module, granularity: str = "heads") -> Structure:
    """Couplings of every layer: heads (or Q/K and V/O dimensions) and FFN neurons.

    Costs are methods.md §1.3's table; a packed model's last layer may cost less (``use_packed``).
    Raises UsageError for another architecture or granularity.
    """
    require_one_of(granularity, "granularity", GRANULARITIES)
    layers = encoder_layers(model)
    family = layers[0].family
    packing = packing_of(model)
    couplings: list[Coupling] = []
    for layer in layers:
        made = list(_couplings(layer, granularity))
        if packing is not None and packing.cls_only and layer is layers[-1]:
            made = [_on_first_tokens(c, layer) for c in made]
        couplings += made
    inside = {layer.prefix for layer in layers}
    per_token, per_sequence = _outside_flops(model, inside, family)
    trimmable = sum(c.params * c.units for c in couplings)
    return Structure(
        couplings=tuple(couplings),
        fixed_token_flops=per_token,
        fixed_sequence_flops=per_sequence,
        fixed_params=_params_without_embeddings(model, family) - trimmable,
    )


def attention_of(coupling: Coupling, family: Family) -> str:
    """The module name of the attention that a coupling of dimensions is in."""
    rows = next(m.module for m in coupling.members if m.axis == 0)
    role = "query" if coupling.kind == "qk" else "value"
    return rows.removesuffix(family.linears[role]) + family.attention


def check_sizes(model: nn.Module, plan: Plan, coupling: Coupling) -> None:
    """Raise UsageError unless every head keeps as many dimensions, in an attention that can."""
    kept = plan.kept_units(coupling).view(coupling.heads, -1).sum(1)
    same = int(kept.min()) == int(kept.max())
    require(same, f"plan: {coupling.name}", "as many dimensions in every head", kept.tolist())
    family = family_of(model)
    kind = type(model.get_submodule(attention_of(coupling, family)))
    able = family.compact is not None and family.compact.attention is stock_class(kind)
    wanted = f"{family.title}'s own attention for dimensions"
    require(able, f"plan: {coupling.name}", wanted, kind.__name__)


def head_linears(model: nn.Module) -> tuple[str, ...]:
    """Names of the linears of the model's pooler and classifier.

    Raises UsageError for another architecture.
    """
    family = family_of(model)
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name.endswith(family.pooler_linear) or name.split(".")[0] == family.classifier)
    )


def head_sizes(attention: Any) -> tuple[int, int]:
    """Dimensions of a head in query and key, and in value and output."""
    full = attention.attention_head_size
    return getattr(attention, "qk_head_size", full), getattr(attention, "vo_head_size", full)


def shape_of(layer: Layer, role: str) -> tuple[int, int]:
    """Rows and columns of the weight of the linear of that role."""
    linear: Any = layer.linear(role)
    return int(linear.weight.shape[0]), int(linear.weight.shape[1])


def _couplings(layer: Layer, granularity: str) -> Iterator[Coupling]:
    family = layer.family
    qk_size, vo_size = head_sizes(layer.attention)
    query, value = (shape_of(layer, role)[0] for role in ("query", "value"))
    heads = query // qk_size
    require(
        query == heads * qk_size and value == heads * vo_size,
        f"model: {layer.prefix}.{family.attention}",
        "query and value rows that are whole heads",
        f"{query} and {value} rows for head sizes {qk_size} and {vo_size}",
    )
    require(
        granularity != "heads" or qk_size == vo_size,
        "granularity",
        "'dimensions' for a model trimmed by dimensions",
        repr(granularity),
    )
    for couples in family.couplings[granularity]:
        unit_size = qk_size if couples.kind == "heads" else 1
        by_head = couples.kind in ("qk", "vo")
        yield _coupling(layer, couples, unit_size, heads if by_head else 1)


def _coupling(layer: Layer, couples: Couples, unit_size: int, heads: int) -> Coupling:
    rows, width = shape_of(layer, couples.rows[0])
    members = (
        *(_member(layer, role, 0) for role in couples.rows),
        *(_member(layer, role, 1) for role in couples.columns),
    )
    return Coupling(
        name=f"layer.{layer.index}.{couples.kind}",
        kind=couples.kind,
        layer=layer.index,
        units=rows // unit_size,
        unit_size=unit_size,
        members=members,
        linear_flops=2 * width * unit_size * len(members),
        attention_flops=couples.attention_flops * unit_size,
        params=unit_size * (width * len(members) + len(couples.rows)),
        heads=heads,
    )


def _on_first_tokens(coupling: Coupling, layer: Layer) -> Coupling:
    """One query per sequence: Q, output projection and FFN run once, K and V for every token."""
    on_all = {layer.name("key"), layer.name("value")}
    every = sum(m.module in on_all for m in coupling.members)
    each = coupling.linear_flops / len(coupling.members)
    return replace(
        coupling,
        linear_flops=each * every,
        sequence_flops=each * (len(coupling.members) - every),
        attention_flops=0,
        key_flops=coupling.attention_flops,
    )


def _member(layer: Layer, role: str, axis: int) -> Member:
    return Member(module=layer.name(role), axis=axis, shape=shape_of(layer, role))


def _outside_flops(model: nn.Module, encoder: set[str], family: Family) -> tuple[int, int]:
    """Forward FLOPs of the linears outside the encoder: per token, per sequence."""
    per_token = per_sequence = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(name.startswith(f"{p}.") for p in encoder):
            continue
        flops = 2 * module.in_features * module.out_features
        if family.pooler in name or name.startswith(family.classifier):
            per_sequence += flops
        else:
            per_token += flops
    return per_token, per_sequence


def _params_without_embeddings(model: nn.Module, family: Family) -> int:
    outside = f"{family.embeddings}."
    return sum(p.numel() for n, p in model.named_parameters() if outside not in n)
