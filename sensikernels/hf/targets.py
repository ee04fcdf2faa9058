"""Where a BERT's trimmable units are, and what each costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf.packed import packing_of
from sensikernels.masks.plans import Plan
from sensikernels.masks.structure import Coupling, Member, Structure

GRANULARITIES = ("heads", "dimensions")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The linears of one encoder layer, with their names in the model."""

    index: int
    prefix: str
    module: Any

    def linear(self, part: str) -> nn.Module:
        """``query``, ``key``, ``value``, ``attention_output``, ``intermediate`` or ``output``."""
        return self.module.get_submodule(LAYER_LINEARS[part])

    def name(self, part: str) -> str:
        """The linear's full module name."""
        return f"{self.prefix}.{LAYER_LINEARS[part]}"


LAYER_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


ATTENTIONS = {
    "BertSelfAttention": "bert",
    "RobertaSelfAttention": "roberta",
    "XLMRobertaSelfAttention": "xlm_roberta",
    "CamembertSelfAttention": "camembert",
    "ElectraSelfAttention": "electra",
    "TrimmedSelfAttention": "sk_bert",
}
"""Attention classes whose arithmetic is BERT's, by where transformers keeps them."""


def encoder_layers(model: nn.Module) -> list[Layer]:
    """The layers of the model's BERT encoder, lowest first.

    Raises:
        UsageError: as ``bert_layers``, or they are a decoder's.
    """
    layers = bert_layers(model)
    for layer in layers:
        parts = (layer.module, layer.module.attention, layer.module.attention.self)
        decodes = any(getattr(part, flag, False) for part in parts for flag in _DECODES)
        require(not decodes, "model", "an encoder", f"a decoder ({type(model).__name__})")
    return layers


_DECODES = ("is_decoder", "is_causal", "add_cross_attention", "is_cross_attention")


def bert_layers(model: nn.Module) -> list[Layer]:
    """The layers of the model's BERT, encoder or decoder, lowest first.

    Raises:
        UsageError: the model has no layers laid out like BERT's, or those of several models, or
            their attention is not known to be BERT's.
    """
    found = [
        (name, module.layer)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer", None), nn.ModuleList)
        and len(module.layer) > 0
        and all(_has(module.layer[0], path) for path in LAYER_LINEARS.values())
    ]
    kind = type(model).__name__
    expected = "an encoder laid out like BERT's (layer.N.attention.self.query, …)"
    require(len(found) > 0, "model", expected, kind)
    require(len(found) == 1, "model", "one encoder", f"{len(found)} in {kind}")
    name, layers = found[0]
    for layer in layers:
        _require_known(layer.attention.self)
    root = f"{name}.layer" if name else "layer"
    return [Layer(index=i, prefix=f"{root}.{i}", module=layer) for i, layer in enumerate(layers)]


def _require_known(attention: nn.Module) -> None:
    kind = type(attention)
    bases = (base for base in kind.__mro__ if _is_known(base))
    known = any(kind.forward is base.forward for base in bases)  # type: ignore[attr-defined]
    require(known, "model", f"attention of {', '.join(ATTENTIONS)}", kind.__name__)


def _is_known(kind: type) -> bool:
    home = ATTENTIONS.get(kind.__name__)
    return home == "sk_bert" or kind.__module__ == f"transformers.models.{home}.modeling_{home}"


def attention_of(coupling: Coupling) -> str:
    """The module name of the attention that a coupling of dimensions is in."""
    rows = next(m.module for m in coupling.members if m.axis == 0)
    part = "query" if coupling.kind == "qk" else "value"
    return rows.removesuffix(LAYER_LINEARS[part]) + "attention.self"


def check_sizes(model: nn.Module, plan: Plan, coupling: Coupling) -> None:
    """Raise UsageError unless every head keeps as many dimensions, in an attention that can."""
    kept = plan.kept_units(coupling).view(coupling.heads, -1).sum(1)
    same = int(kept.min()) == int(kept.max())
    require(same, f"plan: {coupling.name}", "as many dimensions in every head", kept.tolist())
    kind = type(model.get_submodule(attention_of(coupling)))
    able = kind.__name__ in ("BertSelfAttention", "TrimmedSelfAttention")
    require(able, f"plan: {coupling.name}", "BERT's own attention for dimensions", kind.__name__)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def structure_of(model: nn.Module, granularity: str = "heads") -> Structure:
    """Couplings of every layer: heads (or Q/K and V/O dimensions) and FFN neurons.

    Costs are methods.md §1.3's table; a packed model's last layer may cost less (``use_packed``).
    Raises UsageError for another architecture or granularity.
    """
    require_one_of(granularity, "granularity", GRANULARITIES)
    layers = encoder_layers(model)
    packing = packing_of(model)
    couplings: list[Coupling] = []
    for layer in layers:
        made = [*_attention(layer, granularity), _neurons(layer)]
        if packing is not None and packing.cls_only and layer is layers[-1]:
            made = [_on_first_tokens(c) for c in made]
        couplings += made
    inside = {layer.prefix for layer in layers}
    per_token, per_sequence = _outside_flops(model, inside)
    trimmable = sum(c.params * c.units for c in couplings)
    return Structure(
        couplings=tuple(couplings),
        fixed_token_flops=per_token,
        fixed_sequence_flops=per_sequence,
        fixed_params=_params_without_embeddings(model) - trimmable,
    )


def _attention(layer: Layer, granularity: str) -> Iterator[Coupling]:
    attention = layer.module.get_submodule("attention.self")
    query, value = (_shape(layer, part) for part in ("query", "value"))
    width = query[1]
    qk_dim = getattr(attention, "qk_head_size", attention.attention_head_size)
    vo_dim = getattr(attention, "vo_head_size", attention.attention_head_size)
    heads = query[0] // qk_dim
    require(
        query[0] == heads * qk_dim and value[0] == heads * vo_dim,
        f"model: {layer.prefix}.attention.self",
        "query and value rows that are whole heads",
        f"{query[0]} and {value[0]} rows for head sizes {qk_dim} and {vo_dim}",
    )
    rows = {part: _member(layer, part, 0) for part in ("query", "key", "value")}
    columns = _member(layer, "attention_output", 1)
    if granularity == "heads":
        require(
            qk_dim == vo_dim,
            "granularity",
            "'dimensions' for a model trimmed by dimensions",
            repr(granularity),
        )
        yield Coupling(
            name=f"layer.{layer.index}.heads",
            kind="heads",
            layer=layer.index,
            units=heads,
            unit_size=qk_dim,
            members=(*rows.values(), columns),
            linear_flops=8 * width * qk_dim,
            attention_flops=4 * qk_dim,
            params=qk_dim * (4 * width + 3),
        )
        return
    for kind, size, members, biases in (
        ("qk", qk_dim, (rows["query"], rows["key"]), 2),
        ("vo", vo_dim, (rows["value"], columns), 1),
    ):
        yield Coupling(
            name=f"layer.{layer.index}.{kind}",
            kind=kind,
            layer=layer.index,
            units=heads * size,
            unit_size=1,
            members=members,
            linear_flops=4 * width,
            attention_flops=2,
            params=2 * width + biases,
            heads=heads,
        )


def _on_first_tokens(coupling: Coupling) -> Coupling:
    """One query per sequence: Q, output projection and FFN run once, K and V for every token."""
    every = sum(m.module.endswith(("key", "value")) for m in coupling.members)
    each = coupling.linear_flops / len(coupling.members)
    return replace(
        coupling,
        linear_flops=each * every,
        sequence_flops=each * (len(coupling.members) - every),
        attention_flops=0,
        key_flops=coupling.attention_flops,
    )


def _neurons(layer: Layer) -> Coupling:
    neurons, width = _shape(layer, "intermediate")
    return Coupling(
        name=f"layer.{layer.index}.neurons",
        kind="neurons",
        layer=layer.index,
        units=neurons,
        unit_size=1,
        members=(_member(layer, "intermediate", 0), _member(layer, "output", 1)),
        linear_flops=4 * width,
        attention_flops=0,
        params=2 * width + 1,
    )


def _shape(layer: Layer, part: str) -> tuple[int, int]:
    linear: Any = layer.linear(part)
    return int(linear.weight.shape[0]), int(linear.weight.shape[1])


def _member(layer: Layer, part: str, axis: int) -> Member:
    return Member(module=layer.name(part), axis=axis, shape=_shape(layer, part))


def _outside_flops(model: nn.Module, encoder: set[str]) -> tuple[int, int]:
    """Forward FLOPs of the linears outside the encoder: per token, per sequence."""
    per_token = per_sequence = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(name.startswith(f"{p}.") for p in encoder):
            continue
        flops = 2 * module.in_features * module.out_features
        if "pooler" in name or name.startswith("classifier"):
            per_sequence += flops
        else:
            per_token += flops
    return per_token, per_sequence


def _params_without_embeddings(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "embeddings." not in n)
