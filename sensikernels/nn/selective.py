"""A linear that trains a part of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sensikernels.layouts import assign_, kept_values, layout_of
from sensikernels.masks.mask import Mask
from sensikernels.nn._layout import MaskedModule, check_mask
from sensikernels.ops.selective_linear import explain, selective_linear


class SelectiveLinear(MaskedModule):
    """A dense linear of which only the entries under the mask are trained.

    ``weight`` is a frozen buffer, ``values`` the Parameter: gradients, optimizer state, DDP
    traffic and clipping are those of the kept entries. The state dict is the dense linear's
    (``weight`` merged, ``bias``), so checkpoints go both ways.

    ``weight`` carries ``values`` in place, so the forward is one dense GEMM. Every forward copies
    the kept entries into it first: a write through ``.data`` leaves no trace by which to know that
    it may be left out.

    With DDP pass ``broadcast_buffers=False``: the frozen weight need not travel every step.
    """

    weight: Tensor
    values: nn.Parameter
    bias: nn.Parameter | None
    _explained = staticmethod(explain)

    def __init__(
        self,
        weight: Tensor,
        values: nn.Parameter,
        bias: nn.Parameter | None,
        mask: Mask,
        *,
        activation: str = "none",
        backend: str = "auto",
    ) -> None:
        compact = mask.block_shape != (1, 1)
        super().__init__(mask, weight.device, compact_input=compact, compact_output=compact)
        self.activation, self.backend = activation, backend
        self.register_buffer("weight", weight)
        self.values = values
        self.register_parameter("bias", bias)
        self._seen: tuple[int, int] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: Mask,
        *,
        train_bias: bool = True,
        activation: str = "none",
        backend: str = "auto",
    ) -> SelectiveLinear:
        """Train ``linear`` under ``mask``; its weight tensor becomes the frozen buffer, uncopied.

        ``bias`` is shared; ``train_bias=False`` freezes it.

        Raises:
            UsageError: the mask is not of this weight's shape.
        """
        check_mask(linear, mask)
        weight = linear.weight.detach()
        layout = layout_of(mask.grid.to(weight.device), mask.block_shape, mask.shape)
        values = nn.Parameter(kept_values(weight, layout).clone())
        bias = linear.bias
        if bias is not None and not train_bias:
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        module = cls(weight, values, bias, mask, activation=activation, backend=backend)
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` with the trained entries merged; weight and bias are shared."""
        self.refresh()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        self.refresh()
        return selective_linear(
            x,
            self.weight,
            self.values,
            self.layout,
            self.bias,
            activation=self.activation,
            backend=self.backend,
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Write ``values`` into ``weight``."""
        values = self.values
        if torch.compiler.is_compiling() or values.is_inference():
            assign_(self.weight, values, self.layout)
            return
        # A write that only repeats what is there must not invalidate graphs that saved weight.
        version = (id(values), values._version)
        assign_(self.weight if version != self._seen else self.weight.data, values, self.layout)
        self._seen = version

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.refresh()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "values"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        state_dict = dict(state_dict)
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.shape == self.weight.shape:
            layout = self._layout_on(weight.device)
            state_dict[prefix + "values"] = kept_values(weight, layout).clone()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{self._describe()}, bias={self.bias is not None}{activation}"


__all__ = ["SelectiveLinear"]
