"""A plan: which entries of which linear are kept or trained, under which budget, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._checks import require
from sensikernels.errors import CheckpointError, UsageError
from sensikernels.masks.budget import Budget
from sensikernels.masks.flops import tokens_of, training_flops
from sensikernels.masks.mask import Mask
from sensikernels.masks.structure import Coupling, coupling_from_json, coupling_to_json

FORMAT = 1
WEIGHT_MASK, UPDATE_MASK = "weight_mask", "update_mask"
_PLAIN = (
    "method",
    "sequence_length",
    "flops_dense",
    "flops_planned",
    "params_dense",
    "params_planned",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Masks by module name, with the couplings that let compact shapes propagate.

    ``weight_masks`` multiply weights in the forward pass; ``update_masks`` choose the entries
    that get a gradient. ``trainable`` names the parameters that train (None: all of them).
    FLOPs are training FLOPs per token at ``sequence_length``.
    """

    method: str
    weight_masks: Mapping[str, Mask] = field(default_factory=dict)
    update_masks: Mapping[str, Mask] = field(default_factory=dict)
    trainable: tuple[str, ...] | None = None
    couplings: tuple[Coupling, ...] = ()
    budget: Budget | None = None
    sequence_length: float = 128.0
    flops_dense: float = 0.0
    flops_planned: float = 0.0
    params_dense: int = 0
    params_planned: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)

    def kept_units(self, coupling: Coupling) -> Tensor:
        """bool ``[units]``: what the plan keeps of a coupling."""
        mask = self.weight_masks.get(coupling.members[0].module)
        if mask is None:
            return torch.ones(coupling.units, dtype=torch.bool)
        return mask.grid.flatten()

    def kept_counts(self) -> dict[str, int]:
        """Kept units by coupling name."""
        return {c.name: int(self.kept_units(c).sum()) for c in self.couplings}

    @property
    def flops_ratio(self) -> float:
        """Planned over dense FLOPs."""
        return self.flops_planned / self.flops_dense if self.flops_dense else 1.0

    @property
    def params_ratio(self) -> float:
        """Planned over dense parameters, embeddings left out."""
        return self.params_planned / self.params_dense if self.params_dense else 1.0

    def verify(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, dense: nn.Module | None = None
    ) -> Measured:
        """Count the FLOPs of one training step of ``model`` (the plan applied) on ``batch``.

        With ``dense``, the same batch is counted on the dense model too, so that the ratio is
        measured over measured; without it the planned dense figure is the denominator.
        """
        tokens = tokens_of(batch)
        got = training_flops(model, batch) / tokens
        reference = self.flops_dense if dense is None else training_flops(dense, batch) / tokens
        return Measured(flops_per_token=got, dense_flops_per_token=reference)

    def __str__(self) -> str:
        asked = "none" if self.budget is None else f"{self.budget.measure} {self.budget.requested}"
        lines = [
            f"{self.method}: budget {asked}, FLOPs x{self.flops_ratio:.4f}, "
            f"parameters x{self.params_ratio:.4f}"
        ]
        for coupling in self.couplings:
            kept = int(self.kept_units(coupling).sum())
            lines.append(f"  {coupling.name:<20} {kept:>6} of {coupling.units}")
        for name, mask in self.update_masks.items():
            lines.append(f"  train {name}: {mask}")
        if self.trainable is not None:
            lines.append(f"  trains {len(self.trainable)} parameters, the rest is frozen")
        return "\n".join(lines)

    def save(self, path: Path | str) -> None:
        """Write ``path`` (JSON) and, beside it, the grids as safetensors; each by renaming.

        The JSON goes last: a plan whose JSON exists is whole.
        """
        from safetensors.torch import save_file

        path = Path(path)
        grids = {
            f"{kind}:{name}": mask.grid.to(torch.uint8).contiguous()
            for kind, name, mask in self._masks()
        }
        tensors = path.with_suffix(".safetensors")
        temporary = tensors.with_name(tensors.name + ".tmp")
        save_file(grids, temporary)
        temporary.replace(tensors)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: a file is missing, unreadable or not a plan of this format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        try:
            data = json.loads(path.read_text())
            grids = load_file(path.with_suffix(".safetensors"))
            return cls._from_json(data, grids)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"plan {path}: {type(error).__name__}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Everything but the grids, with the kept counts for people."""
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _PLAIN},
            "flops_ratio": self.flops_ratio,
            "params_ratio": self.params_ratio,
            "budget": None if self.budget is None else self.budget.to_json(),
            "trainable": None if self.trainable is None else list(self.trainable),
            "kept": self.kept_counts(),
            "couplings": [coupling_to_json(c) for c in self.couplings],
            "masks": [
                {"kind": kind, "module": name, "block_shape": list(m.block_shape),
                 "shape": list(m.shape), "density": m.density}
                for kind, name, m in self._masks()
            ],
            "origin": dict(self.origin),
        }  # fmt: skip

    def _masks(self) -> list[tuple[str, str, Mask]]:
        kinds = ((WEIGHT_MASK, self.weight_masks), (UPDATE_MASK, self.update_masks))
        return [(kind, name, mask) for kind, masks in kinds for name, mask in masks.items()]

    @classmethod
    def _from_json(cls, data: Mapping[str, Any], grids: Mapping[str, Tensor]) -> Plan:
        require(data["format"] == FORMAT, "plan format", FORMAT, data["format"])
        masks: dict[str, dict[str, Mask]] = {WEIGHT_MASK: {}, UPDATE_MASK: {}}
        for item in data["masks"]:
            masks[item["kind"]][item["module"]] = Mask(
                grid=grids[f"{item['kind']}:{item['module']}"].bool(),
                block_shape=tuple(item["block_shape"]),
                shape=tuple(item["shape"]),
            )
        trainable = data["trainable"]
        return cls(
            **{name: data[name] for name in (*_PLAIN, "origin")},
            weight_masks=masks[WEIGHT_MASK],
            update_masks=masks[UPDATE_MASK],
            trainable=None if trainable is None else tuple(trainable),
            couplings=tuple(coupling_from_json(c) for c in data["couplings"]),
            budget=None if data["budget"] is None else Budget(**data["budget"]),
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Training FLOPs per token, counted."""

    flops_per_token: float
    dense_flops_per_token: float

    @property
    def ratio(self) -> float:
        """Measured over dense."""
        if not self.dense_flops_per_token:
            raise UsageError("plan: expected a dense FLOPs figure to compare with, got none")
        return self.flops_per_token / self.dense_flops_per_token
