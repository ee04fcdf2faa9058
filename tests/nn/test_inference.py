"""Without gradients: the weight of a forward is the one that is there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sensikernels.masks.mask import Mask
from sensikernels.nn import MaskedLinear

OUT, IN = 64, 48


@pytest.fixture(params=["blocks", "rows", "elements", "nearly all rows"])
def module(request: pytest.FixtureRequest) -> MaskedLinear:
    mask = {
        "blocks": Mask.blocks(torch.eye(4, 3).bool(), (16, 16), (OUT, IN)),
        "rows": Mask.rows(torch.arange(OUT) % 3 > 0, (OUT, IN)),
        "nearly all rows": Mask.rows(torch.arange(OUT) > 0, (OUT, IN)),
        "elements": Mask.elements(torch.rand(OUT, IN) < 0.5),
    }[request.param]
    return MaskedLinear.from_linear(nn.Linear(IN, OUT), mask, activation="gelu").eval()


def test_modes_give_the_same(module: MaskedLinear):
    x = torch.randn(5, IN)
    expected = module(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected.detach())


CHANGES = ["in place", "load", "parameter", "data", "write through data", "step", "dtype"]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_the_weight_is_missed(module: MaskedLinear, change: str):
    x = torch.randn(5, IN)
    with torch.no_grad():
        before = module(x)
        if change == "in place":
            module.weight.mul_(2)
        elif change == "load":
            module.load_state_dict(nn.Linear(IN, OUT).state_dict())
        elif change == "parameter":
            module.weight = nn.Parameter(module.weight * 2)
        elif change == "data":
            module.weight.data = module.weight * 2
        elif change == "write through data":
            module.weight.data.mul_(2)
        elif change == "dtype":
            module.double()
            x = x.double()
    if change == "step":
        module(x).sum().backward()
        module.weight.data.sub_(module.weight.grad)
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        after = module(x)
        assert torch.equal(after, fresh(x))
    assert not torch.equal(after, before)
