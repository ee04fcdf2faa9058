"""LoRA adapters of PEFT beside linears of a model, in place, and merged again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels._core.errors import SensiError
from sensikernels.hf.aside import check_linear

_ADAPTER = "default"
BASE = "base_layer"
"""The name of the linear itself inside the layer that holds its adapter."""


@torch.no_grad()
def inject_lora(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
) -> tuple[str, ...]:
    """Put an adapter ``y + (alpha/rank) · B A dropout(x)`` beside each linear named.

    A is random by ``seed`` alone, B zero, both in the linear's dtype (Hu et al. 2021, arXiv
    2106.09685). Returns the names of A and B in model order. They are frozen until a plan is
    applied that names them; what requires a gradient otherwise stays so.

    Raises:
        SensiError: PEFT is not installed. UsageError: a name is not a plain ``nn.Linear``'s, or
            the model has adapters already.
    """
    if find_spec("peft") is None:
        raise SensiError("adapters: expected PEFT installed, got none: pip install peft")
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(names)
    require(not any(_layers(model)), "model", "no adapters", "some")
    for name in targets:
        weight: Any = model.get_parameter(f"{name}.weight")
        check_linear(model, name, tuple(weight.shape))
    before = {p: p.requires_grad for p in model.parameters()}
    scale: Any = alpha  # PEFT's annotation says int, its arithmetic takes any number
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets)
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for parameter in model.parameters():
        parameter.requires_grad_(before.get(parameter, False))
    return tuple(name for name, p in model.named_parameters() if p not in before)


@torch.no_grad()
def deltas(model: nn.Module) -> dict[str, Tensor]:
    """``(alpha/rank) · B A`` float32 of every adapter, by the name its linear had without it."""
    return {name: _delta(layer) for name, layer in _layers(model)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its linear's weight, rounded once, and take it out.

    Raises UsageError, before anything is changed, for a linear that is none, or a sum that is not
    finite.
    """
    merged = []
    for name, layer in _layers(model):
        linear = layer.get_base_layer()
        require(type(linear) is nn.Linear, f"module {name}", "an nn.Linear", type(linear).__name__)
        weight = (linear.weight.float() + _delta(layer)).to(linear.weight.dtype)
        require(bool(weight.isfinite().all()), f"module {name}", "finite weights", "others")
        merged.append((name, linear, weight))
    for name, linear, weight in merged:
        linear.weight.data.copy_(weight)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    for module in model.modules():
        vars(module).pop("peft_config", None)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return iter([(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")])


def _delta(layer: Any) -> Tensor:
    down, up = (pair[_ADAPTER].weight.float() for pair in (layer.lora_A, layer.lora_B))
    delta: Tensor = (up @ down) * layer.scaling[_ADAPTER]
    return delta
