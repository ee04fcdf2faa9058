"""Learning-rate schedules of transformers, as factors of the peak rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""Those of transformers that are functions of the step and need nothing but a warm-up."""


def rate_factor(
    name: str, *, warmup_steps: int, max_steps: int, rate: float
) -> Callable[[int], float]:
    """The factor of the learning rate for a 0-based step, by transformers' ``get_scheduler``.

    ``rate``: the peak; ``polynomial`` ends at an absolute one, 1e-7.
    """
    from transformers import get_scheduler

    idle = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=rate)
    made: Any = get_scheduler(
        name, idle, num_warmup_steps=warmup_steps, num_training_steps=max_steps
    )
    factor: Callable[[int], float] = made.lr_lambdas[0]
    return factor
