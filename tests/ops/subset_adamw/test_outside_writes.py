"""Writes to parameters, state and groups between two steps count in the next one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.optim import SubsetAdamW

Change = Callable[[SubsetAdamW, nn.Parameter, nn.Parameter], Any]
CHANGES: dict[str, Change] = {
    "nothing": lambda o, p, q: None,
    "data of another storage": lambda o, p, q: setattr(p, "data", p.data.clone()),
    "strided data": lambda o, p, q: setattr(p, "data", p.data.t().contiguous().t()),
    "data written": lambda o, p, q: p.data.mul_(2),
    "step replaced": lambda o, p, q: o.state[p].update(step=o.state[p]["step"] + 5),
    "step written": lambda o, p, q: o.state[p]["step"].add_(5),
    "moment replaced": lambda o, p, q: o.state[p].update(exp_avg=o.state[p]["exp_avg"] * 0),
    "moment written": lambda o, p, q: o.state[p]["exp_avg_sq"].mul_(4),
    "lr": lambda o, p, q: o.param_groups[0].update(lr=0.5),
    "betas": lambda o, p, q: o.param_groups[0].update(betas=(0.5, 0.6)),
    "mode": lambda o, p, q: o.param_groups[0].update(mode="as_published"),
    "moved to a group": lambda o, p, q: (
        o.param_groups[0].update(params=[p]),
        o.add_param_group({"params": [q], "lr": 0.5}),
    ),
    "group appended": lambda o, p, q: (
        o.param_groups[0].update(params=[p]),
        o.param_groups.append({**o.param_groups[0], "params": [q], "lr": 0.5}),
    ),
    "removed": lambda o, p, q: o.param_groups[0].update(params=[p]),
    "reordered": lambda o, p, q: o.param_groups[0].update(params=[q, p]),
    "state cleared": lambda o, p, q: o.state.clear(),
    "one state gone": lambda o, p, q: o.state.pop(p),
    "state copied": lambda o, p, q: o.state.update({p: copy.deepcopy(o.state[p])}),
}


def step(optimizer: SubsetAdamW, params: tuple[nn.Parameter, ...], seed: int) -> None:
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(10 * seed + index)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_as_an_optimizer_that_remembers_nothing(
    name: str, kept: bool, dtype: torch.dtype, backend: str
) -> None:
    if kept and name in ("state cleared", "one state gone", "mode"):
        return  # what is kept is state itself
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 8), (5,)))
    optimizer = SubsetAdamW([p, q], lr=0.1, backend=backend)
    if kept:
        optimizer.set_kept(p, ("rows", torch.tensor([1, 2, 5], dtype=torch.int32)))
    for seed in range(3):
        step(optimizer, (p, q), seed)
    CHANGES[name](optimizer, p, q)
    p2, q2, forgetful = copy.deepcopy((p, q, optimizer))
    for seed in (7, 8):
        step(optimizer, (p, q), seed)
        step(forgetful, (p2, q2), seed)
        forgetful.params_changed()
        assert torch.equal(p, p2)
        assert torch.equal(q, q2)


def test_data_of_another_shape_is_refused() -> None:
    p = nn.Parameter(torch.randn(6, 8))
    optimizer = SubsetAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = torch.randn(3, 8)
    p.grad = torch.ones_like(p)
    with pytest.raises(UsageError, match=r"state: exp_avg: expected \[3, 8\], got \[6, 8\]"):
        optimizer.step()
