"""A BERT small enough to train in a second, with the demo task's own vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensikernels.masks import Budget
from sensikernels.methods import METHODS
from sensikernels.training import Settings
from tests.training.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with dropout 0: what draws masks in another order loses the same."""
    from transformers import BertConfig

    path = save_tiny(tmp_path_factory.mktemp("still") / "model")
    config = BertConfig.from_pretrained(path)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(path)
    return path


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Callable[..., Settings]:
    """``Settings`` of a run of a few steps into ``tmp_path / "out"``."""

    def make(**given: Any) -> Settings:
        named: dict[str, Any] = {
            "task": "demo",
            "model": str(tiny),
            "output": tmp_path / "out",
            "method": "sensi-bert",
            "max_train_samples": 96,
            "batch_size": 16,
            "ranking_rows": 64,
            "device": "cpu",
            **given,
        }
        if METHODS[named["method"]].needs_budget and "budget" not in named:
            named["budget"] = Budget(flops=0.6)
        return Settings(**named)

    return make
