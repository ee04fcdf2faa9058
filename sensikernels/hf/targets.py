"""The units of a model that can be trimmed, and the cost of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf.family import SIX_LINEARS, Couples, Family, stock_class
from sensikernels.hf.layers import Layer, encoder_layers, family_of
from sensikernels.hf.modeling_compact import biased_attention, trimmed_attention
from sensikernels.hf.packed.step import packing_of
from sensikernels.masks.plans import Plan
from sensikernels.masks.structure import Coupling, Member, Structure

GRANULARITIES = tuple(SIX_LINEARS)
_READ_TOKENS = ("ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
"""How the names of models end whose head reads every token."""


def structure_of(model: nn.Module, granularity: str = "heads") -> Structure:
    """Couplings of every layer: heads (or Q/K and V/O dimensions) and FFN neurons.

    Costs are methods.md §1.3's table; a packed model's last layer may cost less (``use_packed``).
    Raises UsageError for another architecture or granularity.
    """
    require_one_of(granularity, "granularity", GRANULARITIES)
    layers = encoder_layers(model)
    family = layers[0].family
    able = granularity in family.couplings
    require(
        able, "granularity", f"one of {', '.join(family.couplings)} for {family.title}", granularity
    )
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
    outside = _params_without_embeddings(model, family)
    return Structure(
        couplings=tuple(couplings),
        fixed_token_flops=per_token,
        fixed_sequence_flops=per_sequence,
        fixed_params=outside - trimmable,
        embedding_params=sum(p.numel() for p in model.parameters()) - outside,
    )


def attention_of(coupling: Coupling, family: Family) -> str:
    """The module name of the attention that a coupling of dimensions is in."""
    rows = next(m.module for m in coupling.members if m.axis == 0)
    path = next(path for path in family.linears.values() if rows.endswith(f".{path}"))
    return rows.removesuffix(path) + family.attention


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
    named = ("attention_head_size", "head_dim")
    full = next(getattr(attention, name) for name in named if hasattr(attention, name))
    return getattr(attention, "qk_head_size", full), getattr(attention, "vo_head_size", full)


ATTENTION_LEFT = ("qk_head_size", "vo_head_size", "kept_heads")
"""What ``attention_left`` adds to an attention that has none of it."""


def attention_left(
    attention: Any,
    family: Family,
    kept: Mapping[str, Tensor],
    couplings: Mapping[str, Coupling],
) -> tuple[type, dict[str, Any]]:
    """The class and the attributes of an attention of which a plan keeps ``kept``, by kind."""
    assert family.compact is not None
    kind, (qk_size, vo_size) = type(attention), head_sizes(attention)
    left: dict[str, Any] = {}
    if "heads" in kept:
        heads = int(kept["heads"].sum())
        if family.compact.biased:
            had = getattr(attention, "kept_heads", range(len(kept["heads"])))
            pairs = zip(had, kept["heads"].tolist(), strict=True)
            left["kept_heads"] = tuple(head for head, stays in pairs if stays)
            kind = biased_attention(stock_class(kind))
    else:
        heads = next(iter(couplings.values())).heads
        left = {f"{unit}_head_size": int(bits.sum()) // heads for unit, bits in kept.items()}
        qk_size, vo_size = left.get("qk_head_size", qk_size), left.get("vo_head_size", vo_size)
        kind = trimmed_attention(stock_class(kind), family.parts())
    counts = {"heads": heads, "qk": heads * qk_size, "vo": heads * vo_size}
    return kind, {**left, **{n: counts[c] for n, c in family.compact.counts.items()}}


def attention_rows(layer: Layer) -> tuple[int, int]:
    """Rows of query and of value, wherever the family keeps them."""
    rows: dict[str | None, int] = {}
    for role, (unit, _) in layer.family.units().items():
        if layer.has(role) and role not in layer.family.optional:
            rows.setdefault(unit, shape_of(layer, role)[0] // layer.family.repeats.get(role, 1))
    return rows.get("qk", rows["vo"]), rows["vo"]


def shape_of(layer: Layer, role: str) -> tuple[int, int]:
    """Rows and columns of the weight of the linear of that role."""
    linear: Any = layer.linear(role)
    return int(linear.weight.shape[0]), int(linear.weight.shape[1])


def _couplings(layer: Layer, granularity: str) -> Iterator[Coupling]:
    family = layer.family
    qk_size, vo_size = head_sizes(layer.attention)
    query, value = attention_rows(layer)
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
    members = tuple(
        _member(layer, role, axis)
        for axis, roles in enumerate((couples.rows, couples.columns))
        for role in roles
        if layer.has(role)
    )
    rows, width = members[0].shape
    lines = sum(member.repeats for member in members)
    tables = sum(layer.has(role) for role in couples.rows if role in layer.family.optional)
    biases = sum(m.repeats for m in members if m.axis == 0 and layer.bias(m.module))
    return Coupling(
        name=f"layer.{layer.index}.{couples.kind}",
        kind=couples.kind,
        layer=layer.index,
        units=rows // unit_size // members[0].repeats,
        unit_size=unit_size,
        members=members,
        linear_flops=2 * width * unit_size * (lines - tables),
        attention_flops=couples.attention_flops * unit_size,
        params=unit_size * (width * lines + biases),
        heads=heads,
    )


def _on_first_tokens(coupling: Coupling, layer: Layer) -> Coupling:
    """One query per sequence: Q, output projection and FFN run once, K and V for every token.

    A linear of all three runs for every token.
    """
    on_all = {layer.name(role) for role in _ON_EVERY_TOKEN if layer.has(role)}
    every = sum(m.repeats for m in coupling.members if m.module in on_all)
    lines = sum(m.repeats for m in coupling.members)
    each = coupling.linear_flops / lines
    return replace(
        coupling,
        linear_flops=each * every,
        sequence_flops=each * (lines - every),
        attention_flops=0,
        key_flops=coupling.attention_flops,
    )


_ON_EVERY_TOKEN = ("key", "value", "query_key_value")


def _member(layer: Layer, role: str, axis: int) -> Member:
    repeats = layer.family.repeats.get(role, 1) if axis == 0 else 1
    return Member(module=layer.name(role), axis=axis, shape=shape_of(layer, role), repeats=repeats)


def _outside_flops(model: nn.Module, encoder: set[str], family: Family) -> tuple[int, int]:
    """Forward FLOPs of the linears outside the encoder: per token, per sequence."""
    per_token = per_sequence = 0
    reads_tokens = type(model).__name__.endswith(_READ_TOKENS)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(name.startswith(f"{p}.") for p in encoder):
            continue
        flops = 2 * module.in_features * module.out_features
        if not reads_tokens and (family.pooler in name or family.classifier in name.split(".")):
            per_sequence += flops
        else:
            per_token += flops
    return per_token, per_sequence


def _params_without_embeddings(model: nn.Module, family: Family) -> int:
    outside = f"{family.embeddings}."
    return sum(p.numel() for n, p in model.named_parameters() if outside not in n)
