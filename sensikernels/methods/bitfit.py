"""BitFit: train biases and the classifier only (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import (
    Family,
    apply,
    below_layers,
    encoder_layers,
    family_of,
    structure_of,
)
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.parts import Parts, plan_of

SUBSETS: Mapping[str, tuple[str, ...]] = {
    "all": (),
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "intermediate": ("intermediate",),
    "output": ("attention_output", "output"),
    "output_layernorm": ("attention_norm", "output_norm"),
    "attention_layernorm": ("attention_norm",),
    "frozen": (),
}
"""Roles of the linears and norms whose biases train, as the paper's code selects them; ``output``
and ``output_layernorm`` are the attention's and the FFN's alike, ``all`` is every bias."""


def select(names: Iterable[str], subsets: Sequence[str], family: Family) -> tuple[str, ...]:
    """The parameters that BitFit trains, of all ``names`` of a model of ``family``.

    The task head always trains, the pooler's bias too unless the subset is ``frozen`` alone.
    Raises UsageError for a subset that is unknown, or of linears that the family has not.
    """
    for subset in subsets:
        require_one_of(subset, "subsets", SUBSETS)
    paths = {**family.linears, **family.norms}
    able = [name for name, roles in SUBSETS.items() if all(role in paths for role in roles)]
    for subset in subsets:
        known = f"one of {', '.join(able)} for {family.title}"
        require(subset in able, "subsets", known, subset)
    patterns = [f"{paths[role]}.bias" for subset in subsets for role in SUBSETS[subset]]
    patterns += ["bias"] if "all" in subsets else []
    patterns += [] if set(subsets) == {"frozen"} else [f"{family.pooler_linear}.bias"]
    return tuple(n for n in names if any(p in n for p in patterns) or n.startswith(family.heads))


@dataclass(kw_only=True, eq=False)
class BitFit(Method):
    """Freeze every weight; ``subsets`` names the biases that train (``SUBSETS``)."""

    name = "bitfit"
    summary = "biases and the classifier train, every weight is frozen"
    learning_rate = 1e-3
    schedule = "constant"

    subsets: Sequence[str] = option(("all",), f"biases that train: {', '.join(SUBSETS)}")

    def __post_init__(self) -> None:
        for subset in self.subsets:
            require_one_of(subset, "subsets", SUBSETS)
        self.subsets = tuple(self.subsets)

    def begin(self, run: Run) -> None:
        """Freeze before the first step, so that no weight gradient is ever computed.

        Raises UsageError where nothing but the head would train, unless ``frozen`` asks for it.
        """
        names = (name for name, _ in run.model.named_parameters())
        trainable = select(names, self.subsets, family_of(run.model))
        self._require_biases(run.model, trainable)
        run.plan = plan_of(
            run,
            self.name,
            Parts(whole=trainable),
            trainable=trainable,
            shapes=structure_of(run.model).shapes(),
            origin={"subsets": list(self.subsets)},
        )
        apply(run.model, run.plan, optimizer=run.optimizer)
        run.events.append(f"step 0: {len(trainable)} parameters train, the rest is frozen")

    def _require_biases(self, model: nn.Module, trainable: Sequence[str]) -> None:
        """Raise UsageError where subsets ask for biases and the encoder has none of them."""
        layers = (layer.prefix for layer in encoder_layers(model))
        inside = tuple(f"{name}." for name in (*below_layers(model), *layers))
        found = set(self.subsets) == {"frozen"} or any(n.startswith(inside) for n in trainable)
        wanted = "biases in the encoder (frozen trains the head alone)"
        got = f"none of {', '.join(self.subsets)} in {type(model).__name__}"
        require(found, "subsets", wanted, got)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Freezing needs nothing but the names."""
        self.begin(run)
