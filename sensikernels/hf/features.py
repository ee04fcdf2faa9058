"""The features of the fast step, switched on and off together by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf.dropout import restore_dropout, use_counter_dropout
from sensikernels.hf.inner import transformer_in
from sensikernels.hf.packed.step import cache_frozen_prefix, restore_packed, use_packed

STEP_FEATURES = {
    "dropout": "dropout masks from a counter instead of the serial generator; short attention by "
    "two products",
    "words": "row-sparse gradient of the word table (for SubsetAdamW)",
    "packed": "tokens end to end, no padding",
    "cls": "a classifier's last layer on first tokens only; brings packed",
    "fused": "bias + GELU, dropout + residual + LayerNorm, query, key and value where that gains, "
    "embeddings in one pass each; brings packed",
    "labelled": "a masked-language model's head on labelled tokens, in training; brings packed",
    "prefix-cache": "what frozen lowest layers compute is kept across epochs; brings packed",
}
"""What ``apply(model, features=…)`` knows. Off: the model as it came."""

_RECORD = "_sensikernels_features"
_ON_PACKED = {"packed", "cls", "fused", "labelled", "prefix-cache"}


def check_features(model: nn.Module, features: Iterable[str]) -> frozenset[str]:
    """``features`` as a set. Raises UsageError: a name unknown, or features in use already."""
    wanted = (features,) if isinstance(features, str) else tuple(features)
    for feature in wanted:
        require_one_of(feature, "features", tuple(STEP_FEATURES))
    require(not (wanted and has_features(model)), "features", "none in use (restore first)", "some")
    if "words" in wanted:
        words = transformer_in(model).get_input_embeddings()
        dense = isinstance(words, nn.Embedding) and not words.sparse
        require(dense, "model", "a word table with dense gradients", words)
    return frozenset(wanted)


def has_features(model: nn.Module) -> bool:
    """Whether ``use_features`` changed this model."""
    return hasattr(model, _RECORD)


def use_features(model: nn.Module, wanted: frozenset[str]) -> tuple[str, ...]:
    """Switch ``wanted`` on, all of them or none; one line per change."""
    done: list[str] = []
    report: list[str] = []
    try:
        if "dropout" in wanted:
            names = use_counter_dropout(model)
            done.append("dropout")
            report.append(f"counter dropout in {len(names)} modules and in attention")
        if "words" in wanted:
            _words(model).sparse = True
            done.append("words")
            report.append("row-sparse gradient of the word table")
        if wanted & _ON_PACKED:
            report += use_packed(
                model,
                cls_only="cls" in wanted,
                fused="fused" in wanted,
                labelled_only="labelled" in wanted,
            )
            done.append("packed")
        if "prefix-cache" in wanted:
            report.append(f"output of the lowest {cache_frozen_prefix(model).depth} layers kept")
    except BaseException:
        _take_back(model, done)
        raise
    if done:
        object.__setattr__(model, _RECORD, tuple(done))
    return tuple(report)


def restore_features(model: nn.Module) -> None:
    """Undo ``use_features``."""
    _take_back(model, getattr(model, _RECORD))
    object.__delattr__(model, _RECORD)


def _take_back(model: nn.Module, done: Sequence[str]) -> None:
    if "packed" in done:
        restore_packed(model)
    if "words" in done:
        _words(model).sparse = False
    if "dropout" in done:
        restore_dropout(model)


def _words(model: nn.Module) -> nn.Embedding:
    words: nn.Embedding = transformer_in(model).get_input_embeddings()
    return words
