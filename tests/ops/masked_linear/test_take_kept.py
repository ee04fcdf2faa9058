"""Packing at a mask change: what ``layouts.kept_values`` says, where asked, in any dtype."""

from __future__ import annotations

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.layouts import kept_values, layout_of
from sensikernels.ops.masked_linear import take_kept
from tests.ops.linear_cases import GRIDS, make_layout


@pytest.mark.parametrize("compact", ["", "in out"])
@pytest.mark.parametrize("name", GRIDS)
def test_as_pack(name: str, compact: str):
    layout = make_layout(name, compact=compact)
    tensors = [torch.randn(layout.shape).to(d) for d in (torch.bfloat16, torch.float32)] * 2
    got = take_kept(tensors, layout)
    into = [torch.full_like(one, torch.nan) for one in got]
    kept = take_kept(tensors, layout, into)
    for mine, here, target, source in zip(got, kept, into, tensors, strict=True):
        assert mine.dtype == source.dtype
        assert torch.equal(mine, kept_values(source, layout))
        assert here is target
        assert torch.equal(target, mine)


def test_all_of_a_weight_is_itself_and_elements_are_compact():
    weight = torch.randn(6, 5)
    full = layout_of(torch.ones(6, 1).bool(), (1, 5), (6, 5))
    assert take_kept([weight], full)[0] is weight
    eye = layout_of(torch.eye(6, 5).bool(), (1, 1), (6, 5))
    assert torch.equal(take_kept([weight], eye)[0], weight.diagonal())
    assert take_kept([], full) == []


def test_refusals_name_argument_expected_and_got():
    layout = make_layout("rows")
    weight = torch.randn(layout.shape)
    values = kept_values(weight, layout)
    for arguments, message in [
        (([weight.T], layout), r"tensors: expected \[50, 37\], got \[37, 50\]"),
        (([weight], layout, [values[1:]]), "into: expected"),
        (([weight, weight], layout, [values]), "into: expected 2 tensors, got 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            take_kept(*arguments)
