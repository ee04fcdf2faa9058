"""Without gradients: the dense weight a masked linear keeps, and when it stops being true."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sensikernels.masks.mask import Mask
from sensikernels.nn import MaskedLinear, masked

OUT, IN = 64, 48


@pytest.fixture(params=["blocks", "rows", "elements"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MaskedLinear:
    """One that infers dense, whatever this device's table says."""
    monkeypatch.setattr(masked, "prefers_dense", lambda *_: True)
    mask = {
        "blocks": Mask.blocks(torch.eye(4, 3).bool(), (16, 16), (OUT, IN)),
        "rows": Mask.rows(torch.arange(OUT) % 3 > 0, (OUT, IN)),
        "elements": Mask.elements(torch.rand(OUT, IN) < 0.5),
    }[request.param]
    return MaskedLinear.from_linear(nn.Linear(IN, OUT), mask, activation="gelu").eval()


def kept(module: MaskedLinear) -> Tensor | None:
    return module._unpacked.weight


def test_it_is_kept_and_gives_the_same(module: MaskedLinear):
    x = torch.randn(5, IN)
    expected = module(x)
    assert kept(module) is None
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
        first = kept(module)
        assert first is not None
        with FlopCounterMode(display=False) as counter:
            module(x)
    assert kept(module) is first
    assert counter.get_total_flops() == 2 * 5 * OUT * IN
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected.detach())


@pytest.mark.parametrize("change", ["in place", "load", "parameter", "data", "step", "dtype"])
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


def test_modes_copies_and_gradients_drop_it(module: MaskedLinear):
    x = torch.randn(5, IN)

    def infer() -> None:
        with torch.no_grad():
            module(x)
        assert kept(module) is not None

    infer()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert kept(other) is None
        with torch.no_grad():
            assert torch.equal(other(x), module(x))
    module.train()
    assert kept(module) is None
    infer()
    module(x)
    assert kept(module) is None


@pytest.mark.parametrize("case", ["autocast", "backend", "wrong width"])
def test_what_it_does_not_serve_takes_the_op(module: MaskedLinear, case: str):
    x = torch.randn(5, IN)
    with torch.no_grad():
        if case == "autocast":
            with torch.autocast("cpu"):
                assert module(x).dtype == torch.bfloat16
        elif case == "backend":
            module.backend = "reference"
            module(x)
        else:
            with pytest.raises(ValueError, match="x: expected"):
                module(x[:, 1:])
    assert kept(module) is None


def test_compact_layers_have_nothing_to_unpack():
    mask = Mask.rows(torch.arange(OUT) % 3 > 0, (OUT, IN))
    module = MaskedLinear.from_linear(nn.Linear(IN, OUT), mask, compact_output=True)
    with torch.no_grad():
        module(torch.randn(5, IN))
    assert kept(module) is None
