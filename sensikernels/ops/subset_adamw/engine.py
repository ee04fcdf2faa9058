"""Which implementation runs a step, and what it keeps between steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels._core import environment, extension
from sensikernels._core.checks import require_one_of
from sensikernels._core.errors import UsageError
from sensikernels.ops.subset_adamw import native, reference
from sensikernels.ops.subset_adamw.item import Item

BACKENDS = ("auto", "native", "reference")


def choose(backend: str, device: torch.device, dtypes: set[torch.dtype]) -> tuple[str, str]:
    """The backend that serves parameters of ``dtypes`` on ``device``, and why.

    Raises ``UsageError`` if ``backend`` is named and cannot serve them.
    """
    require_one_of(backend, "backend", BACKENDS)
    if backend == "reference":
        return backend, "asked for"
    refusal = native.why_not(device, dtypes)
    if backend == "native":
        if refusal is not None:
            raise UsageError(f"backend: native cannot run this step: {refusal}")
        return backend, "asked for"
    if environment.backend() == "reference":
        return "reference", "SENSIKERNELS_BACKEND=reference"
    if refusal is None:
        return "native", f"the extension's {device.type} kernel serves all parameters"
    extension.available()
    return "reference", refusal


class Engine:
    """Runs steps by one backend; remembers descriptors of the item list it saw last."""

    def __init__(self, backend: str) -> None:
        require_one_of(backend, "backend", BACKENDS)
        self.backend = backend
        self._table = native.StepTable()
        self._items: Sequence[Item] | None = None
        self._runs_native = False

    def update(
        self,
        items: Sequence[Item],
        hyper: Tensor,
        *,
        max_grad_norm: float | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor:
        """See ``reference.update``. The same list object means the same items, but for their
        ``grad`` and ``entries``."""
        if items is not self._items:
            name, _ = choose(self.backend, hyper.device, {item.param.dtype for item in items})
            self._runs_native = name == "native"
            self._items = items
        strided = [(item.param, item.home) for item in items if item.home is not None]
        for param, home in strided:
            param.copy_(home)
        run = self._table.update if self._runs_native else reference.update
        norm = run(
            items,
            hyper,
            max_grad_norm=max_grad_norm,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        for param, home in strided:
            home.copy_(param)
        return norm
