"""Drop an encoder's upper layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from sensikernels._core.checks import require
from sensikernels.hf import optimizer as following
from sensikernels.hf.inner import transformer_in
from sensikernels.hf.layers import encoder_layers


def keep_lowest(model: nn.Module, depth: int, *, optimizer: Optimizer | None = None) -> None:
    """Keep the ``depth`` lowest encoder layers, in place and for good; the config says so too.

    What ``optimizer`` holds of the dropped layers leaves it. Raises UsageError: ``depth`` is not
    between one and the number of layers; a model of no known family.
    """
    layers = encoder_layers(model)
    require(1 <= depth <= len(layers), "depth", f"1 to {len(layers)} layers", depth)
    dropped = [p for layer in layers[depth:] for p in layer.module.parameters()]
    holder: Any = model.get_submodule(layers[0].prefix.rpartition(".")[0])
    del holder[depth:]
    config = transformer_in(model).config
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:depth]
    if optimizer is not None:
        following.commit(optimizer, (), {}, frozen=dropped)
