"""Units of a model that are trimmed together, and their costs. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sensikernels.masks.geometry import Geometry

TRAIN_FACTOR = 3
"""Forward, input gradient and weight gradient cost the same FLOPs (methods.md's F, dX, dW)."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One linear of a coupling: units are bands of its rows (axis 0) or columns (axis 1).

    ``repeats``: how often all units follow each other, as in one linear of query, key and value.
    """

    module: str
    axis: int
    shape: tuple[int, int]
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Linears that lose the same units together; ``unit_size`` rows or columns make a unit.

    ``linear_flops``: forward FLOPs per token and unit; ``attention_flops``: forward FLOPs per
    token, unit and key position; ``params``: parameters per unit, biases of rows included.
    ``sequence_flops``: those of linears that run once per sequence, ``key_flops``: attention's per
    unit and key where each sequence asks one query, as a packed model's last layer may.
    ``heads``: for per-dimension attention kinds, how many heads share the units evenly.
    """

    name: str
    kind: str
    layer: int
    units: int
    unit_size: int
    members: tuple[Member, ...]
    linear_flops: float
    attention_flops: int
    params: int
    heads: int = 1
    sequence_flops: float = 0
    key_flops: float = 0

    def linear(self, sequence_length: float) -> float:
        """Forward FLOPs per token and unit in products with weights."""
        return self.linear_flops + self.sequence_flops / sequence_length

    def flops(self, sequence_length: float) -> float:
        """Training FLOPs per token and unit at this sequence length."""
        attention = self.key_flops + self.attention_flops * sequence_length
        return TRAIN_FACTOR * (self.linear(sequence_length) + attention)

    def at(self, tokens_per_sequence: float, attended: float) -> Coupling:
        """The same unit with what runs once per sequence counted per token."""
        return replace(
            self,
            linear_flops=self.linear_flops + self.sequence_flops / tokens_per_sequence,
            sequence_flops=0,
            key_flops=self.key_flops * attended,
        )


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Every coupling of a model, and what no mask can remove.

    ``fixed_token_flops`` are forward FLOPs per token, ``fixed_sequence_flops`` per sequence
    (pooler, classifier); ``fixed_params`` leaves out the embeddings, which have
    ``embedding_params``.
    """

    couplings: tuple[Coupling, ...]
    fixed_token_flops: float
    fixed_sequence_flops: float
    fixed_params: int
    embedding_params: int = 0

    def at(self, geometry: Geometry) -> Structure:
        """The same structure for batches of this geometry, so that FLOPs of a run are exact.

        Attention follows Σ B·S² / Σ B·S, what runs once per sequence follows Σ B·S / Σ B, keys
        the tokens that packed batches do not round up.
        """
        each = geometry.tokens_per_sequence
        per_token = self.fixed_token_flops + self.fixed_sequence_flops / each
        couplings = tuple(c.at(each, geometry.attended) for c in self.couplings)
        return replace(
            self, couplings=couplings, fixed_token_flops=per_token, fixed_sequence_flops=0
        )

    def fixed_flops(self, sequence_length: float) -> float:
        """Training FLOPs per token that no mask can remove."""
        per_token = self.fixed_token_flops + self.fixed_sequence_flops / sequence_length
        return TRAIN_FACTOR * per_token

    def flops(self, sequence_length: float, kept: Mapping[str, int] | None = None) -> float:
        """Training FLOPs per token with ``kept`` units by coupling name (default all)."""
        counts = {c.name: c.units for c in self.couplings} | dict(kept or {})
        trimmable = sum(c.flops(sequence_length) * counts[c.name] for c in self.couplings)
        return trimmable + self.fixed_flops(sequence_length)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every weight that can be trimmed, by module name."""
        return {m.module: m.shape for c in self.couplings for m in c.members}

    def params(self, kept: Mapping[str, int] | None = None) -> int:
        """Parameters outside the embeddings with ``kept`` units by coupling name."""
        counts = {c.name: c.units for c in self.couplings} | dict(kept or {})
        return self.fixed_params + sum(c.params * counts[c.name] for c in self.couplings)


def coupling_to_json(coupling: Coupling) -> dict[str, Any]:
    """A plain dictionary that ``coupling_from_json`` reads back."""
    return {
        **{k: v for k, v in vars(coupling).items() if k != "members"},
        "members": [_member_to_json(m) for m in coupling.members],
    }


def _member_to_json(member: Member) -> dict[str, Any]:
    once = {"repeats"} if member.repeats == 1 else set()
    return {k: v for k, v in vars(member).items() if k not in once} | {"shape": list(member.shape)}


def coupling_from_json(data: Mapping[str, Any]) -> Coupling:
    """The inverse of ``coupling_to_json``."""
    members = tuple(Member(**{**m, "shape": tuple(m["shape"])}) for m in data["members"])
    return Coupling(**{**data, "members": members})
