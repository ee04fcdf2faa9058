"""HuggingFace BERT: units, swaps, sensitivities, compact models. All that knows transformers."""

from sensikernels.hf.compact import compact
from sensikernels.hf.dropout import restore_dropout, use_counter_dropout
from sensikernels.hf.load import load_model, load_tokenizer, quiet
from sensikernels.hf.sensitivity import CRITERIA, sensitivity
from sensikernels.hf.swap import applied, apply, restore
from sensikernels.hf.targets import encoder_layers, structure

__all__ = [
    "CRITERIA",
    "applied",
    "apply",
    "compact",
    "encoder_layers",
    "load_model",
    "load_tokenizer",
    "quiet",
    "restore",
    "restore_dropout",
    "sensitivity",
    "structure",
    "use_counter_dropout",
]
