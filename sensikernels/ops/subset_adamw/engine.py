"""The implementation that runs a step, and what it keeps between steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels._core.checks import require_one_of
from sensikernels.ops.common.choice import Choice, choose
from sensikernels.ops.subset_adamw import native, reference
from sensikernels.ops.subset_adamw.item import Item, Scaling

BACKENDS = ("auto", "native", "reference")


def choice(backend: str, device: torch.device, dtypes: set[torch.dtype]) -> Choice:
    """The backend that runs a step of parameters of ``dtypes`` on ``device``, and why.

    Raises ``UsageError`` if ``backend`` is unknown, or named and cannot serve them.
    """
    refusals = {"native": native.why_not(device, dtypes), "reference": None}
    reason = f"the extension's {device.type} kernel serves all parameters"
    return choose(refusals, backend, reason=reason)


class Engine:
    """Runs steps by one backend; remembers descriptors of the item list it saw last."""

    def __init__(self, backend: str) -> None:
        require_one_of(backend, "backend", BACKENDS)
        self.backend = backend
        self._table = native.StepTable()
        self._items: Sequence[Item] | None = None
        self._runs_native = False

    def update(self, items: Sequence[Item], hyper: Tensor, scaling: Scaling) -> Tensor:
        """See ``reference.update``. The same list object means the same items, but for their
        ``grad`` and ``entries``."""
        if items is not self._items:
            dtypes = {item.param.dtype for item in items}
            self._runs_native = choice(self.backend, hyper.device, dtypes).backend == "native"
            self._items = items
        strided = [(item.param, item.home) for item in items if item.home is not None]
        for param, home in strided:
            param.copy_(home)
        run = self._table.update if self._runs_native else reference.update
        norm = run(items, hyper, scaling)
        for param, home in strided:
            home.copy_(param)
        return norm
