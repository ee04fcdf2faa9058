"""Masked and selective linear kernels, sensitivity reductions, and budgeted BERT fine-tuning.

scores = sensikernels.sensitivity(model, batches)
plan = sensikernels.plan(scores, sensikernels.Budget(flops=0.5))
sensikernels.apply(model, plan)      # train with any loop
model = sensikernels.compact(model)  # a smaller HuggingFace model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensikernels._core.auto import register_when_imported
from sensikernels._core.lazy import resolver

if TYPE_CHECKING:
    from sensikernels.hf.compact import compact as compact
    from sensikernels.hf.dropout import use_counter_dropout as use_counter_dropout
    from sensikernels.hf.export import export as export
    from sensikernels.hf.packed.step import use_packed as use_packed
    from sensikernels.hf.sensitivity import sensitivity as sensitivity
    from sensikernels.hf.swap import apply as apply
    from sensikernels.hf.swap import restore as restore
    from sensikernels.masks import Budget as Budget
    from sensikernels.masks import Mask as Mask
    from sensikernels.masks import Plan as Plan
    from sensikernels.masks import Scores as Scores
    from sensikernels.masks import plan as plan
    from sensikernels.nn import MaskedLinear as MaskedLinear
    from sensikernels.nn import SelectiveLinear as SelectiveLinear
    from sensikernels.ops.bias_gelu import bias_gelu as bias_gelu
    from sensikernels.ops.cross_entropy import cross_entropy as cross_entropy
    from sensikernels.ops.dropout import dropout as dropout
    from sensikernels.ops.dropout_add_norm import dropout_add_norm as dropout_add_norm
    from sensikernels.ops.embed_norm import embed_norm as embed_norm
    from sensikernels.ops.geglu import geglu as geglu
    from sensikernels.ops.group_reduce import group_reduce as group_reduce
    from sensikernels.ops.masked_linear import masked_linear as masked_linear
    from sensikernels.ops.rotary import rotary as rotary
    from sensikernels.ops.select_kept import select_chain as select_chain
    from sensikernels.ops.select_kept import select_kept as select_kept
    from sensikernels.ops.selective_linear import selective_linear as selective_linear
    from sensikernels.ops.varlen_attention import varlen_attention as varlen_attention
    from sensikernels.optim import SubsetAdamW as SubsetAdamW

__version__ = "0.2.0"

# Resolved on first use, so that importing the package costs torch and nothing more.
_HOMES = {
    "Budget": "masks",
    "Mask": "masks",
    "MaskedLinear": "nn",
    "Plan": "masks",
    "Scores": "masks",
    "SelectiveLinear": "nn",
    "SubsetAdamW": "optim",
    "apply": "hf",
    "bias_gelu": "ops.bias_gelu",
    "compact": "hf",
    "cross_entropy": "ops.cross_entropy",
    "dropout": "ops.dropout",
    "dropout_add_norm": "ops.dropout_add_norm",
    "embed_norm": "ops.embed_norm",
    "export": "hf",
    "geglu": "ops.geglu",
    "group_reduce": "ops.group_reduce",
    "masked_linear": "ops.masked_linear",
    "plan": "masks",
    "restore": "hf",
    "rotary": "ops.rotary",
    "select_chain": "ops.select_kept",
    "select_kept": "ops.select_kept",
    "selective_linear": "ops.selective_linear",
    "sensitivity": "hf",
    "use_counter_dropout": "hf",
    "use_packed": "hf",
    "varlen_attention": "ops.varlen_attention",
}

__all__ = sorted(_HOMES)


__getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_when_imported()
