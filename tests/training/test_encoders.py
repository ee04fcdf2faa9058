"""A run on every family of encoders: trained at a budget, compacted, saved and read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.hf import export, load_model
from sensikernels.hf.families import FAMILIES, family_named
from sensikernels.hf.modeling_compact import stock_models
from sensikernels.training import finetune
from tests.hf.families import config_of

BIASED = ("roberta", "distilbert", "electra")
KINDS = [family.name for family in FAMILIES if family.name != "bert"]


def of_kind(kind: str, tiny: Path, to: Path, head: str = "ForSequenceClassification") -> Path:
    """A random model of that kind beside the tiny BERT's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = config_of(kind, vocab_size=len(tokenizer), pad_token_id=0, dropout=0.1)
    stock_models(type(config))[head](config).save_pretrained(to)  # type: ignore[attr-defined]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, to / name)
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trims_and_saves(
    kind: str, tiny: Path, tmp_path: Path, settings: Callable[..., Any]
) -> None:
    fast = family_named(kind).packed is not None
    path = of_kind(kind, tiny, tmp_path / "in")
    if not fast:
        with pytest.raises(UsageError, match="which has relative positions inside attention"):
            finetune(settings(model=str(path)))
    report = finetune(settings(model=str(path), packed=fast, max_train_samples=64))
    assert report["saved_model"]["bit_equal"]
    assert report["failed"] == []
    assert report["budget"]["flops_ratio_planned"] <= 0.6
    if kind != "deberta-v2":  # its products with relative positions are not in the plan
        measured = report["budget"]["flops_ratio_measured"]
        assert measured == pytest.approx(report["budget"]["flops_ratio_planned"], rel=0.03)
    small = load_model(tmp_path / "out" / "model", labels=2)
    assert type(export(small)).__name__ == report["saved_model"]["class"].removeprefix("Sk")


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_gets_a_new_head(
    kind: str, tiny: Path, tmp_path: Path, settings: Callable[..., Any]
) -> None:
    path = of_kind(kind, tiny, tmp_path / "in", "ForMaskedLM")
    model = load_model(path, labels=3)
    assert model.config.num_labels == 3  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "three")  # type: ignore[operator]
    assert load_model(tmp_path / "three", labels=2) is not None


METHODS = [
    *((kind, method) for kind in BIASED for method in ("bitfit", "dps", "freeze")),
    *(("modernbert", method) for method in ("dps", "freeze")),  # it has no biases
]


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_other_methods_run(
    kind: str, method: str, tiny: Path, tmp_path: Path, settings: Callable[..., Any]
) -> None:
    path = of_kind(kind, tiny, tmp_path / "in")
    report = finetune(settings(model=str(path), method=method, max_train_samples=64))
    assert report["saved_model"]["bit_equal"]
