"""A linear whose weight has only its kept entries."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels._core import environment
from sensikernels.layouts import full_weight, kept_values
from sensikernels.masks.mask import Mask
from sensikernels.nn._layout import MaskedModule, check_mask
from sensikernels.ops.masked_linear import explain, masked_linear, take_kept


class MaskedLinear(MaskedModule):
    """``act(x @ W^T + bias)``, W zero outside the mask; ``weight`` holds the kept entries only.

    Made by :meth:`from_linear`. ``weight`` and ``bias`` are ordinary Parameters: optimizers, DDP
    and checkpoints see what is kept. A state dict of the dense linear loads too and is compact.

    - ``compact_input``: x is ``[..., kept_in]``, the features of kept columns.
    - ``compact_output``: y is ``[..., kept_out]``, the features of kept rows, and bias with it.
      Otherwise y is full and dropped rows give ``act(bias)``.

    Nothing is kept between calls: a weight written in any way, through ``.data`` too, is the weight
    of the next forward. ``to_linear`` unpacks once where a dense layer serves better.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    _explained = staticmethod(explain)

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        mask: Mask,
        *,
        compact_input: bool = False,
        compact_output: bool = False,
        activation: str = "none",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            mask, weight.device, compact_input=compact_input, compact_output=compact_output
        )
        self.activation, self.backend = activation, backend
        self.register_parameter("weight", cast(nn.Parameter, weight))
        self.register_parameter("bias", cast("nn.Parameter | None", bias))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: Mask,
        *,
        compact_input: bool = False,
        compact_output: bool = False,
        activation: str = "none",
        backend: str = "auto",
    ) -> MaskedLinear:
        """Trim ``linear``. Parameters that lose nothing are shared with it, the others copied.

        Raises:
            UsageError: the mask is not of this weight's shape; elements asked to be compact.
        """
        check_mask(linear, mask)
        module = cls(
            linear.weight,
            linear.bias,
            mask,
            compact_input=compact_input,
            compact_output=compact_output,
            activation=activation,
            backend=backend,
        )
        kept = take_kept([linear.weight.detach()], module.layout)[0]
        if kept.shape != linear.weight.shape or kept.data_ptr() != linear.weight.data_ptr():
            module.weight = _like(linear.weight, kept)
        rows = module._bias_rows
        if linear.bias is not None and rows is not None:
            module.bias = _like(linear.bias, linear.bias.detach().index_select(0, rows))
        module.train(linear.training)
        return module

    def to_linear(self, *, full: bool = False) -> nn.Linear:
        """The ``nn.Linear`` that computes the same, activation apart: compact sides stay compact.

        ``full``: of the original size, with zeros in what was dropped. Shares Parameters that
        need no change.
        """
        weight = full_weight(self.weight, self.layout, compact=not full).detach()
        bias = self.bias
        if bias is not None and full and self._bias_rows is not None:
            filled = bias.new_zeros(self.out_features)
            bias = _like(bias, filled.index_copy(0, self._bias_rows.long(), bias).detach())
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.out_features, linear.in_features = weight.shape
        shared = weight.data_ptr() == self.weight.data_ptr() and weight.shape == self.weight.shape
        linear.weight = self.weight if shared else _like(self.weight, weight)
        linear.register_parameter("bias", bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        tensors: dict[str, Any] = self._parameters
        if len(tensors) == 2:  # past Module.__getattr__, which costs more than all else here
            weight, bias = tensors["weight"], tensors["bias"]
        else:  # somebody parametrizes them
            weight, bias = self.weight, self.bias
        if self.layout.direct and self.backend == environment.backend() == "auto":
            try:
                y = F.linear(x, weight, bias)  # what masked_linear comes to, without its checks
            except RuntimeError:
                self._masked(x)  # says what is wrong
                raise
            return y if self.activation == "none" else F.gelu(y)
        return self._masked(x)

    def _masked(self, x: Tensor) -> Tensor:
        return masked_linear(
            x,
            self.weight,
            self.layout,
            self.bias,
            activation=self.activation,
            backend=self.backend,
        )

    @property
    def _bias_rows(self) -> Tensor | None:
        return self.layout.rows if self.layout.compact_output else None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Pack tensors of the dense linear's size; the caller's dictionary is left alone."""
        state_dict = dict(state_dict)
        weight, bias = (state_dict.get(prefix + name) for name in ("weight", "bias"))
        if isinstance(weight, Tensor) and weight.shape == self.mask.shape:
            state_dict[prefix + "weight"] = kept_values(weight, self._layout_on(weight.device))
        rows = self._bias_rows
        full = (self.out_features,)
        if rows is not None and isinstance(bias, Tensor) and bias.shape == full:
            kept = self._layout_on(bias.device).rows
            assert kept is not None
            state_dict[prefix + "bias"] = bias.index_select(0, kept)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        sides = "".join(f", {side}=True" for side, compact in self._compact.items() if compact)
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{self._describe()}, bias={self.bias is not None}{sides}{activation}"


def _like(parameter: Tensor, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


__all__ = ["MaskedLinear"]
