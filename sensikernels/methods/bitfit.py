"""BitFit: train biases and the classifier only (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sensikernels._core.checks import require_one_of
from sensikernels.hf import apply, structure_of
from sensikernels.masks import Plan
from sensikernels.methods.base import Method, Run, option

SUBSETS: Mapping[str, tuple[str, ...]] = {
    "all": ("bias",),
    "query": ("attention.self.query.bias",),
    "key": ("attention.self.key.bias",),
    "value": ("attention.self.value.bias",),
    "intermediate": ("intermediate.dense.bias",),
    "output": ("output.dense.bias",),
    "output_layernorm": ("output.LayerNorm.bias",),
    "attention_layernorm": ("attention.output.LayerNorm.bias",),
    "frozen": (),
}
"""Substrings of parameter names, as the paper's code selects them; ``output`` and
``output_layernorm`` match the attention's and the FFN's alike."""

ALWAYS = ("pooler.dense.bias",)
HEADS = ("classifier", "qa_outputs")


def select(names: Iterable[str], subsets: Sequence[str]) -> tuple[str, ...]:
    """The parameters that BitFit trains, of all ``names``.

    A name trains if it contains one of the subsets' strings; the task head always does, the
    pooler's bias too unless the subset is ``frozen`` alone.
    """
    for subset in subsets:
        require_one_of(subset, "subsets", SUBSETS)
    patterns = [pattern for subset in subsets for pattern in SUBSETS[subset]]
    patterns += [] if set(subsets) == {"frozen"} else ALWAYS
    return tuple(n for n in names if any(p in n for p in patterns) or n.startswith(HEADS))


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
        """Freeze before the first step, so that no weight gradient is ever computed."""
        structure = structure_of(run.model).at(run.geometry)
        length = run.geometry.mean_length
        trainable = select((n for n, _ in run.model.named_parameters()), self.subsets)
        run.plan = Plan(
            method=self.name,
            trainable=trainable,
            sequence_length=length,
            flops_dense=structure.flops(length),
            flops_planned=structure.forward_and_input_flops(length),
            params_dense=structure.params(),
            params_planned=structure.params(),
            shapes=structure.shapes(),
            origin={"subsets": list(self.subsets)},
        )
        apply(run.model, run.plan, optimizer=run.optimizer)
        run.events.append(f"step 0: {len(trainable)} parameters train, the rest is frozen")

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Freezing needs nothing but the names."""
        self.begin(run)
