"""The base class of a ``transformers.Trainer``'s callbacks, and the loss it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from sensikernels.hf.sensitivity import ComputeLoss, own_loss

__all__ = ["TrainerCallback", "default_loss"]


def default_loss(args: Any) -> ComputeLoss:
    """The model's own loss, smoothed as the Trainer's arguments say."""
    factor = args.label_smoothing_factor
    if not factor:
        return own_loss
    smoother = LabelSmoother(epsilon=factor)

    def smoothed(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        inputs = dict(batch)
        if "labels" not in inputs:
            return own_loss(model, batch)
        labels = inputs.pop("labels")
        forward: Any = model
        loss: Tensor = smoother(forward(**inputs), labels)
        return loss

    return smoothed
