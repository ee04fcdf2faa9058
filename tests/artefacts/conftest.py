"""Artefacts to spoil, made once, and what has to hold of whoever reads a spoiled one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sensikernels._core.errors import SensiError
from sensikernels.hf.load import random_model
from tests.artefacts.damage import snapshot


def tiny(**given: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    return random_model("bert", **{**shape, **given})


@pytest.fixture
def refused() -> Callable[..., Any]:
    """``refused(load, file, what)``: None where ``load`` refuses in one line that names ``file``.

    Else what it returns, for the caller to look at. Nothing on disk may change.
    """

    def check(load: Callable[[], Any], file: Path, what: str, *, within: Path | None = None) -> Any:
        before = snapshot(within or file.parent)
        try:
            made = load()
        except SensiError as error:
            line = str(error)
            assert str(file) in line or str(file.parent) in line, f"{what}: names no file: {line}"
            assert "\n" not in line.strip(), f"{what}: several lines: {line}"
            made = None
        except BaseException as error:
            pytest.fail(f"{what}: {type(error).__name__} escapes: {error}")
        assert snapshot(within or file.parent) == before, f"{what}: files changed"
        return made

    return check
