"""Where a BERT's trimmable units are, and what each costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sensikernels._checks import require, require_one_of
from sensikernels.errors import UsageError
from sensikernels.hf.packed import packing_of
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
        return self.module.get_submodule(PARTS[part])

    def name(self, part: str) -> str:
        """The linear's full module name."""
        return f"{self.prefix}.{PARTS[part]}"


PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


def encoder_layers(model: nn.Module) -> list[Layer]:
    """The layers of the model's BERT encoder, lowest first.

    Raises:
        UsageError: the model has no encoder laid out like BERT's.
    """
    for name, module in model.named_modules():
        layers = getattr(module, "layer", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            continue
        if all(_has(layers[0], path) for path in PARTS.values()):
            return [
                Layer(index=i, prefix=f"{name}.layer.{i}", module=layer)
                for i, layer in enumerate(layers)
            ]
    raise UsageError(
        "model: expected an encoder laid out like BERT's (layer.N.attention.self.query, …), "
        f"got {type(model).__name__}"
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def structure(model: nn.Module, granularity: str = "heads") -> Structure:
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
