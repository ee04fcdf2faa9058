"""The mixed weights of DPS Mix, in the model from before the forward until after the backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels.methods.base import Run
from sensikernels.methods.streams import stream

_PENALISED_FROM = 50
"""Stages of fewer steps have no frequency penalty, as in the published code."""


def mixed(weight: Tensor, target: Tensor, mask: Tensor, share: float) -> Tensor:
    """``((1 − m)·T + m·W − p·T) / (1 − p)`` in the dtype of ``weight``; ``mask``: bool, broadcast.

    As ``T + m·(W − T) / (1 − p)``, so that what has not left its target is it to the bit. Its mean
    over masks of which a ``share`` p is zero is ``weight`` (mixout, arXiv 1909.11299).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    full, aim = weight.to(wide), target.to(wide)
    return full.sub(aim).div_(1 - share).mul_(mask).add_(aim).to(weight.dtype)


@dataclass(kw_only=True, eq=False)
class Mix:
    """What DPS Mix knows beside DPS Dense: the weights to mix with, and how often columns trained.

    ``share`` is p. ``start``: pre-trained weights; ``target``: weights at the beginning of stage 2,
    for as long as it lasts; ``seen``: how often each column was drawn in stage 1, float32 [in].
    """

    share: float
    start: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    _columns: dict[str, Tensor] = field(default_factory=dict)
    _raw: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    def draw(self, run: Run, weights: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor]:
        """Draw the columns of each matrix that train in this step: bool ``[in]``, 1 − p of them."""
        generator = stream(torch.device("cpu"), run.seed, run.step)
        self._columns = {
            name: torch.rand(weight.shape[1], generator=generator).ge(self.share).to(weight.device)
            for name, weight in weights.items()
        }
        return self._columns

    def count(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Keep the gradients of the drawn columns alone, and count how often each was drawn."""
        for name, weight in weights.items():
            columns = self._columns[name]
            if weight.grad is not None:
                weight.grad.mul_(columns)
            drawn = columns.float()
            self.seen[name] = self.seen[name] + drawn if name in self.seen else drawn

    def scores(self, name: str, sums: Tensor, length: int) -> Tensor:
        """Squared gradients per time drawn; in stages of 50 steps or more rare columns gain."""
        seen = self.seen[name]
        scores = sums / seen.clamp(min=1)
        return scores * torch.exp(-seen / length) if length >= _PENALISED_FROM else scores

    def put(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        targets: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        """Have ``weights`` hold what is mixed; the raw tensors are set aside untouched.

        An evaluation or a state dict puts them back first: a step may end without ``take_back``,
        as one of fp16 does whose gradients overflow.
        """
        for name, weight in weights.items():
            self._raw[weight] = weight.data
            weight.data = mixed(weight.data, targets[name], masks[name], self.share)

        def before_forward(module: nn.Module, _: Any) -> None:
            if not module.training:
                self._restore()

        self._hooks = [
            model.register_forward_pre_hook(before_forward),
            model.register_state_dict_pre_hook(lambda *_: self._restore()),
        ]

    def take_back(self) -> None:
        """Have the weights hold their raw tensors again."""
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _restore(self) -> None:
        for weight, raw in self._raw.items():
            weight.data = raw
        self._raw = {}
