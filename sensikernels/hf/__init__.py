"""HuggingFace encoders: units, swaps, sensitivities, compact models; all use of transformers."""

from sensikernels.hf.compact import compact
from sensikernels.hf.dropout import restore_dropout, use_counter_dropout
from sensikernels.hf.export import export
from sensikernels.hf.family import Family
from sensikernels.hf.features import STEP_FEATURES
from sensikernels.hf.flops import Measured, measured_flops, training_flops
from sensikernels.hf.layers import below_layers, encoder_layers, family_of
from sensikernels.hf.load import load_model, load_tokenizer, quiet
from sensikernels.hf.module_state import class_of, modes_kept
from sensikernels.hf.optimizer import is_norm
from sensikernels.hf.packed.prefix_cache import uncached
from sensikernels.hf.packed.step import (
    cache_frozen_prefix,
    computed,
    packing_of,
    restore_packed,
    unpacked,
    use_packed,
)
from sensikernels.hf.packed.tokens import to_padded
from sensikernels.hf.sensitivity import (
    CRITERIA,
    ComputeLoss,
    checked_loss,
    own_loss,
    sensitivity,
)
from sensikernels.hf.swap import applied, apply, restore
from sensikernels.hf.targets import head_linears, structure_of

__all__ = [
    "CRITERIA",
    "STEP_FEATURES",
    "ComputeLoss",
    "Family",
    "Measured",
    "applied",
    "apply",
    "below_layers",
    "cache_frozen_prefix",
    "checked_loss",
    "class_of",
    "compact",
    "computed",
    "encoder_layers",
    "export",
    "family_of",
    "head_linears",
    "is_norm",
    "load_model",
    "load_tokenizer",
    "measured_flops",
    "modes_kept",
    "own_loss",
    "packing_of",
    "quiet",
    "restore",
    "restore_dropout",
    "restore_packed",
    "sensitivity",
    "structure_of",
    "to_padded",
    "training_flops",
    "uncached",
    "unpacked",
    "use_counter_dropout",
    "use_packed",
]
