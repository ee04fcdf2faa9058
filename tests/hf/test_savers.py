"""Every saver that HuggingFace users call keeps every weight of a changed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sensikernels.hf import apply, compact, restore
from tests.hf.conftest import make_model
from tests.hf.test_module_state import FAST, plans

pytest.importorskip("accelerate")

STATES = ("stock", "fast", "fast, restored", "fast, trimmed", "selective", "compact")


def make(state: str) -> nn.Module:
    model = make_model()
    made = plans(model)["rows" if state == "selective" else "trim"]
    planned = state in ("fast, trimmed", "selective", "compact")
    if state != "stock":
        apply(model, made if planned else None, features=FAST)
    if state == "fast, restored":
        restore(model)
    return compact(model) if state == "compact" else model


def scrambled(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, before every value is written over."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return state


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(v, now[k]) for k, v in state.items())


@pytest.mark.parametrize("state", STATES)
def test_accelerate_keeps_every_weight(state: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from safetensors.torch import load_file

    model = make(state)
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == set(model.state_dict())
    accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    held = scrambled(model)
    accelerator.load_state(tmp_path / "state")
    assert same(model, held)


@pytest.mark.parametrize("state", STATES)
def test_safetensors_keeps_every_weight(state: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_file, save_model

    model = make(state)
    save_model(model, str(tmp_path / "model.safetensors"))
    save_file(dict(model.state_dict()), tmp_path / "state.safetensors")
    held = scrambled(model)
    load_model(model, tmp_path / "model.safetensors")
    assert same(model, held)


@pytest.mark.parametrize("state", STATES)
def test_torch_keeps_every_weight(state: str, tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    model = make(state)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path / "dcp")
    held = scrambled(model)
    empty = {k: torch.zeros_like(v) for k, v in held.items()}
    checkpoint.load(empty, checkpoint_id=tmp_path / "dcp")
    assert all(torch.equal(v, empty[k]) for k, v in held.items())
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert same(model, held)


@pytest.mark.parametrize("state", ["stock", "fast", "fast, restored", "selective", "compact"])
def test_transformers_keeps_every_weight(state: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = make(state)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    state, read = model.state_dict(), loaded.state_dict()
    assert set(state) == set(read)
    assert all(torch.equal(v, read[k]) for k, v in state.items())
