"""A linear whose weight has only its kept entries."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels import _settings
from sensikernels.dispatch import Choice
from sensikernels.layouts import Layout, pack, to_device, unpack
from sensikernels.masks.mask import Mask
from sensikernels.nn._layout import MaskedModule, check_mask
from sensikernels.ops.masked_linear import explain, masked_linear, prefers_dense, repack


class MaskedLinear(MaskedModule):
    """``act(x @ W^T + bias)``, W zero outside the mask; ``weight`` holds the kept entries only.

    Made by :meth:`from_linear`. ``weight`` and ``bias`` are ordinary Parameters: optimizers, DDP
    and checkpoints see what is kept. A state dict of the dense linear loads too and is packed.

    - ``compact_input``: x is ``[..., kept_in]``, the features of kept columns.
    - ``compact_output``: y is ``[..., kept_out]``, the features of kept rows, and bias with it.
      Otherwise y is full and dropped rows give ``act(bias)``.

    Without gradients, where the device's table says that dense is faster, the weight is unpacked
    once and kept until it changes, a gradient is asked for, or the module is moved or changes
    mode. A write through ``.data`` between two such forwards goes unseen: use ``no_grad``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

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
        self._unpacked = _Unpacked()
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
        kept = repack([linear.weight.detach()], module.layout)[0]
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
        weight = unpack(self.weight, self.layout, compact=not full).detach()
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
        if self.layout.direct and self.backend == _settings.backend() == "auto":
            try:
                y = F.linear(x, weight, bias)  # what masked_linear comes to, without its checks
            except RuntimeError:
                self._masked(x)  # says what is wrong
                raise
            return y if self.activation == "none" else F.gelu(y)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._unpacked.weight = None
            return self._masked(x)
        if self.backend != "auto":
            return self._masked(x)
        dense = self._unpacked.serving(weight, x)
        if dense is None:
            if not self._infers_dense(x):
                return self._masked(x)
            dense = self._unpacked.of(weight, self.layout, x)
        y = F.linear(x, dense, bias)
        return y if self.activation == "none" else F.gelu(y)

    def _masked(self, x: Tensor) -> Tensor:
        return masked_linear(
            x,
            self.weight,
            self.layout,
            self.bias,
            activation=self.activation,
            backend=self.backend,
        )

    def _infers_dense(self, x: Tensor) -> bool:
        return (
            _settings.backend() == "auto"
            and x.dtype == self.weight.dtype
            and x.shape[-1:] == (self.layout.in_width,)
            and not self.weight.is_inference()
            and not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))
            and prefers_dense(self.layout, x)
        )

    def train(self, mode: bool = True) -> MaskedLinear:
        self._unpacked.weight = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._unpacked.weight = None
        return super()._apply(fn, recurse)

    def explain(self, tokens: int = 1024) -> Choice:
        """What runs for ``tokens`` tokens, and why; without gradients if they are off now."""
        weight = self.weight
        return explain(
            self.layout,
            tokens=tokens,
            dtype=weight.dtype,
            device=weight.device,
            backend=self.backend,
            forward=not torch.is_grad_enabled(),
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
            state_dict[prefix + "weight"] = pack(weight, to_device(self.layout, weight.device))
        rows = self._bias_rows
        full = (self.out_features,)
        if rows is not None and isinstance(bias, Tensor) and bias.shape == full:
            state_dict[prefix + "bias"] = bias.index_select(0, rows.to(bias.device))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        sides = "".join(f", {side}=True" for side, compact in self._compact.items() if compact)
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{self._describe()}, bias={self.bias is not None}{sides}{activation}"


class _Unpacked:
    """A dense copy of the weight, and of which state of which tensor it is one."""

    __slots__ = ("device", "dtype", "pointer", "shape", "source", "version", "weight")

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.source: Callable[[], Tensor | None] = lambda: None
        self.version = self.pointer = 0
        self.shape: torch.Size | None = None
        self.dtype: torch.dtype | None = None
        self.device = "cpu"

    def __reduce__(self) -> tuple[type[_Unpacked], tuple[()]]:
        return _Unpacked, ()

    def serving(self, values: Tensor, x: Tensor) -> Tensor | None:
        """The copy, where it is of ``values`` as they are and served an ``x`` like this before."""
        if (
            self.weight is None
            or x.shape != self.shape
            or x.dtype is not self.dtype
            or not self._fresh(values)
            or torch.is_autocast_enabled(self.device)
        ):
            return None
        return self.weight

    def of(self, values: Tensor, layout: Layout, x: Tensor) -> Tensor:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device.type
        if self.weight is None or not self._fresh(values):
            self.source = weakref.ref(values)
            self.version, self.pointer = values._version, values.data_ptr()
            self.weight = unpack(values.detach(), layout, compact=True)
        return self.weight

    def _fresh(self, values: Tensor) -> bool:
        return (
            self.source() is values
            and values._version == self.version
            and values.data_ptr() == self.pointer
        )


def _like(parameter: Tensor, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


__all__ = ["MaskedLinear"]
