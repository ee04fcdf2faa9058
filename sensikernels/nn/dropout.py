"""``nn.Dropout`` that stores no mask."""

from __future__ import annotations

from torch import Tensor, nn

from sensikernels.ops.dropout import dropout


class CounterDropout(nn.Dropout):
    """``nn.Dropout`` from a counter: same distribution, mask drawn again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)
