"""A module that owns a mask and the layout made of it, kept on the device of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.layouts import Layout, layout_of, to_device
from sensikernels.masks.mask import Mask
from sensikernels.ops.common.choice import Choice


class MaskedModule(nn.Module):
    """Holds ``mask`` and ``layout``. Index tensors are no buffers: casts and loads pass them by."""

    mask: Mask
    layout: Layout
    weight: Tensor
    backend: str
    _explained: ClassVar[Callable[..., Choice]]
    """``explain`` of the operator that the layer runs."""

    def __init__(
        self, mask: Mask, device: torch.device, *, compact_input: bool, compact_output: bool
    ) -> None:
        super().__init__()
        self.mask = mask
        self._compact = {"compact_input": compact_input, "compact_output": compact_output}
        self.in_features, self.out_features = mask.shape[1], mask.shape[0]
        self._place(device)

    def _place(self, device: torch.device) -> None:
        self.layout = self._made_on(device)

    def _layout_on(self, device: torch.device) -> Layout:
        """The layout on ``device``; made of the mask anew where it lies on another."""
        return self.layout if device == self._layout_device() else self._made_on(device)

    def _made_on(self, device: torch.device) -> Layout:
        # From the mask, as there may be no data where the layout is now.
        mask = self.mask
        layout = layout_of(mask.grid.cpu(), mask.block_shape, mask.shape, **self._compact)
        return to_device(layout, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._follow()  # assign=True may bring another device

    def _follow(self) -> None:
        """Bring the layout to where the parameters are."""
        device = next(self.parameters()).device
        if device != self._layout_device():
            self._place(device)

    def _layout_device(self) -> torch.device | None:
        """Device of the index tensors; None if the layout has none."""
        tensors = [v for v in vars(self.layout).values() if isinstance(v, Tensor)]
        return tensors[0].device if tensors else None

    def explain(self, tokens: int = 1024) -> Choice:
        """The choice for ``tokens`` tokens: of the layer, or of a trained part's gradient."""
        weight = self.weight
        return self._explained(
            self.layout,
            tokens=tokens,
            dtype=weight.dtype,
            device=weight.device,
            backend=self.backend,
        )

    def _describe(self) -> str:
        mask = self.mask
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={mask.pattern}, density={mask.density:.3g}"
        )


def check_mask(linear: nn.Linear, mask: Mask) -> None:
    """Raise unless ``mask`` is one of ``linear``'s weight."""
    require(isinstance(linear, nn.Linear), "linear", "an nn.Linear", type(linear).__name__)
    require(mask.shape == linear.weight.shape, "mask", list(linear.weight.shape), list(mask.shape))
