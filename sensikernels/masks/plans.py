"""A plan: which entries of which linear are kept or trained, under which budget, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels._core.errors import CheckpointError, UsageError
from sensikernels._core.files import (
    digest_of_file,
    one_line,
    read_json,
    sealed,
    unsealed,
    write_json,
    writing,
)
from sensikernels.masks.budget import Budget
from sensikernels.masks.mask import Mask
from sensikernels.masks.plan_files import (
    FORMAT,
    REMEDY,
    UPDATE_MASK,
    WEIGHT_MASK,
    amount,
    read_coupling,
    read_masks,
    read_names,
    read_shapes,
    text,
    whole_number,
)
from sensikernels.masks.structure import Coupling, Member, coupling_to_json

_AMOUNTS = ("sequence_length", "flops_dense", "flops_planned")
_COUNTS = ("params_dense", "params_planned")
_PLAIN = ("method", *_AMOUNTS, *_COUNTS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Masks by module name, with the couplings that let compact shapes propagate.

    ``weight_masks`` multiply weights in the forward pass; ``update_masks`` choose the entries
    that get a gradient. ``trainable`` names the parameters that train (None: all of them).
    FLOPs are training FLOPs per token at ``sequence_length``. ``shapes``: the weights of the
    encoder that the plan was made for, by module name; empty where any will do that has the masks'.

    Raises:
        UsageError: the masks of a coupling's members do not keep the same units.
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
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for coupling in self.couplings:
            kept = self.kept_units(coupling)
            for member in coupling.members:
                _require_same_units(coupling, member, self.weight_masks.get(member.module), kept)
        masks = {**self.weight_masks, **self.update_masks}
        planned = {name: mask.shape for name, mask in masks.items()}
        planned |= {m.module: m.shape for c in self.couplings for m in c.members}
        for name, shape in planned.items() if self.shapes else ():
            got = self.shapes.get(name)
            require(got == shape, f"plan: shapes: {name}", _said(shape), _said(got))

    def require_made_for(self, model: nn.Module) -> None:
        """Raise UsageError unless ``model`` has the encoder that the plan was made for, no more."""
        if not self.shapes:
            return
        alike = {_any_layer(name) for name in self.shapes}
        here = {
            name: tuple(module.weight.shape)
            for name, module in model.named_modules()
            if _any_layer(name) in alike and isinstance(module.weight, Tensor)
        }
        for name in dict.fromkeys([*self.shapes, *here]):
            want, got = self.shapes.get(name), here.get(name)
            if want != got:
                raise UsageError(
                    f"plan: expected the model it was made for, with {name} {_said(want)}, "
                    f"got one with {_said(got)}"
                )

    def kept_units(self, coupling: Coupling) -> Tensor:
        """bool ``[units]``: what the plan keeps of a coupling."""
        mask = self.weight_masks.get(coupling.members[0].module)
        if mask is None:
            return torch.ones(coupling.units, dtype=torch.bool)
        return mask.grid.flatten()[: coupling.units]

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

        The JSON goes last and holds the digest of the grids: a plan that loads is whole.
        """
        from safetensors.torch import save_file

        path = Path(path)
        grids = {
            f"{kind}:{name}": mask.grid.to(torch.uint8).contiguous()
            for kind, name, mask in self._masks()
        }
        beside = path.with_suffix(".safetensors")
        require(beside != path, "path", "a name that does not end in .safetensors", path)
        with writing(beside) as temporary:
            save_file(grids, temporary)
            digest = digest_of_file(temporary)
        write_json(path, sealed({**self.to_json(), "grids": digest}))

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: a file is missing, edited, damaged, or not a plan of this format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        beside = path.with_suffix(".safetensors")
        try:
            data = unsealed(read_json(path), FORMAT, REMEDY)
            intact = data.pop("grids") == digest_of_file(beside)
            require(intact, beside.name, "the grids of this plan", f"others; {REMEDY}")
            made = cls._from_json(data, load_file(beside))
            whole = json.loads(json.dumps(made.to_json())) == data
            require(whole, "content", "what follows from its masks", "other figures or more")
            return made
        except OSError as error:
            why = f"{Path(error.filename or path).name}: {error.strerror}"
            raise CheckpointError(f"plan {path}: {why}") from error
        except _MALFORMED as error:
            why = f"{type(error).__name__}: {one_line(error)}"
            raise CheckpointError(f"plan {path}: {why}") from error
        except (ValueError, SafetensorError) as error:
            raise CheckpointError(f"plan {path}: {one_line(error)}") from error

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
                {
                    "kind": kind,
                    "module": name,
                    "block_shape": list(m.block_shape),
                    "shape": list(m.shape),
                    "density": m.density,
                }
                for kind, name, m in self._masks()
            ],
            "origin": dict(self.origin),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    def _masks(self) -> list[tuple[str, str, Mask]]:
        kinds = ((WEIGHT_MASK, self.weight_masks), (UPDATE_MASK, self.update_masks))
        return [(kind, name, mask) for kind, masks in kinds for name, mask in masks.items()]

    @classmethod
    def _from_json(cls, data: Mapping[str, Any], grids: Mapping[str, Tensor]) -> Plan:
        text(data["method"], "method")
        for name in _AMOUNTS:
            amount(data[name], name)
        for name in _COUNTS:
            whole_number(data[name], name, 0)
        require(isinstance(data["origin"], dict), "origin", "an object", data["origin"])
        masks = read_masks(data["masks"], grids)
        named = bool(data["shapes"]) or not data["couplings"]
        require(named, "shapes", "those of the model that was ranked", "none")
        return cls(
            **{name: data[name] for name in (*_PLAIN, "origin")},
            weight_masks=masks[WEIGHT_MASK],
            update_masks=masks[UPDATE_MASK],
            trainable=read_names(data["trainable"]),
            couplings=tuple(read_coupling(c) for c in data["couplings"]),
            budget=None if data["budget"] is None else Budget(**data["budget"]),
            shapes=read_shapes(data["shapes"]),
        )


# What taking a stranger's JSON apart raises, where the text alone would not say what was wrong.
_MALFORMED = (KeyError, TypeError, AttributeError, IndexError, OverflowError)


def _require_same_units(
    coupling: Coupling, member: Member, mask: Mask | None, kept: Tensor
) -> None:
    """Raise UsageError unless ``mask`` keeps these bands of units of a member's weight."""
    where = f"plan: {coupling.name}: {member.module}"
    sides = member.shape[member.axis], coupling.units * coupling.unit_size * member.repeats
    require(sides[0] == sides[1], where, f"{sides[1]} rows or columns of units", sides[0])
    if mask is None:
        require(bool(kept.all()), where, "the units that the others keep", "all units")
        return
    height, width = member.shape
    size = coupling.unit_size
    block = (size, width) if member.axis == 0 else (height, size)
    got = (mask.shape, mask.block_shape)
    require(got == (member.shape, block), where, f"bands {block} of {member.shape}", got)
    same = torch.equal(mask.grid.flatten(), kept.repeat(member.repeats))
    require(same, where, "the units that the coupling's others keep", "other ones")


def _any_layer(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
