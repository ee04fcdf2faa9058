"""A layout changed in any one place says so before it is used; a sound one is looked at once."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sensikernels._core.errors import UsageError
from sensikernels.layouts import (
    BlockLayout,
    CompactLayout,
    ElementLayout,
    Layout,
    assign_,
    from_arguments,
    full_weight,
    kept_values,
    layout_of,
    to_arguments,
    to_device,
)
from sensikernels.ops.common.carried import carried
from sensikernels.ops.masked_linear import masked_linear

BLOCKS = st.sampled_from([(1, 1), (1, 5), (4, 3), (16, 16), (50, 1), (1, 37)])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Of a random mask; made anew, so that nothing is known of its values."""
    height, width = draw(BLOCKS)
    shape = draw(st.integers(1, 50)), draw(st.integers(1, 37))
    size = -(-shape[0] // height), -(-shape[1] // width)
    keep = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    grid = torch.rand(size, generator=keep) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    compact = draw(st.booleans()) and (height, width) != (1, 1)
    made = layout_of(grid, (height, width), shape, compact_input=compact, compact_output=compact)
    assert made.sound
    return replace(made)


def tensors(layout: Layout) -> dict[str, Tensor]:
    named = {f.name: getattr(layout, f.name) for f in fields(layout) if f.init}
    return {k: v for k, v in named.items() if isinstance(v, Tensor) and v.numel()}


@given(layouts())
def test_a_mask_makes_what_passes(layout: Layout):
    assert not layout.sound
    layout.check()
    assert layout.sound
    assert to_device(layout, "cpu").sound
    if not isinstance(layout, ElementLayout):
        again = from_arguments(*to_arguments(layout))
        assert again.sound
        assert again.values_shape == layout.values_shape
        assert carried(*to_arguments(layout)) is carried(*to_arguments(layout))


@given(layouts(), st.data())
def test_one_changed_entry_is_found(layout: Layout, data: st.DataObject):
    named = tensors(layout)
    if not named:
        return
    name = data.draw(st.sampled_from(sorted(named)))
    place = data.draw(st.integers(0, named[name].numel() - 1))
    other = named[name].clone()
    value = data.draw(st.integers(-3, 60) | st.sampled_from([2**31 - 1, -(2**31)]))
    feature = isinstance(layout, (CompactLayout, ElementLayout)) or name in ("rows", "columns")
    if feature:  # another ascending choice is as good as this
        value = data.draw(st.sampled_from([-1, 2**31 - 1, int(other[place - 1])]))
    if value == int(other[place]):
        return
    other[place] = value
    damaged = replace(layout, **{name: other})
    with pytest.raises(UsageError, match=r"expected"):
        damaged.check()
    with pytest.raises(UsageError, match=r"expected"):
        kept_values(torch.zeros(layout.shape), damaged)
    assert not damaged.sound


def test_every_use_looks_at_the_values():
    bad = CompactLayout(shape=(8, 8), rows=None, columns=torch.tensor([0, 9, 5]).int())
    values = torch.zeros(8, 3)
    for use in (
        lambda: masked_linear(torch.zeros(4, 8), values, bad),
        lambda: full_weight(values, bad),
        lambda: kept_values(torch.zeros(8, 8), bad),
        lambda: assign_(torch.zeros(8, 8), values, bad),
        lambda: from_arguments(*to_arguments(bad)),
    ):
        with pytest.raises(UsageError, match=r"columns: expected ascending indices in \[0, 8\)"):
            use()


@pytest.mark.parametrize("through", ["in place", "data", "numpy"])
def test_an_index_written_to_is_looked_at_again(through: str):
    layout = CompactLayout(shape=(8, 8), rows=None, columns=torch.tensor([0, 3, 5]).int())
    sizes, index = to_arguments(layout)
    assert carried(sizes, index) is carried(sizes, index)
    written = {"in place": index[0], "data": index[0].data, "numpy": index[0].numpy()}[through]
    written[1] = 99
    with pytest.raises(UsageError, match="columns"):
        carried(sizes, index)
    written[1] = 4
    assert carried(sizes, index).columns.tolist() == [0, 4, 5]


def test_shapes_and_dtypes_are_checked_when_it_is_made():
    index = torch.tensor([0, 2])
    with pytest.raises(UsageError, match=r"rows: expected int32 \[n\]"):
        CompactLayout(shape=(4, 4), rows=index, columns=None)
    with pytest.raises(UsageError, match=r"index: expected int32 \[n\]"):
        ElementLayout(shape=(4, 4), index=index.int()[None])
    with pytest.raises(UsageError, match="columns: expected a tensor on cpu"):
        CompactLayout(shape=(4, 4), rows=index.int(), columns=index.int().to("meta"))
    with pytest.raises(UsageError, match="shape: expected two integers >= 0"):
        CompactLayout(shape=(4, -4), rows=None, columns=None)
    blocks = layout_of(torch.eye(3).bool(), (4, 4), (12, 12))
    assert isinstance(blocks, BlockLayout)
    with pytest.raises(UsageError, match=r"row_idx: expected int32 \[3\]"):
        replace(blocks, row_idx=blocks.row_idx[:2])
    with pytest.raises(UsageError, match="block_shape: expected two integers >= 1"):
        replace(blocks, block_shape=(4, 0))
    with pytest.raises(UsageError, match="kept_entries: expected 48"):
        replace(blocks, kept_entries=47).check()
    with pytest.raises(UsageError, match="block_shape"):
        layout_of(torch.eye(3).bool(), (0, 4), (12, 12))


def test_strided_indices_are_read():
    wide = torch.tensor([0, 9, 2, 9, 5, 9]).int()
    layout = CompactLayout(shape=(8, 8), rows=wide[::2], columns=None)
    x, values = torch.randn(4, 8), torch.randn(3, 8)
    want = masked_linear(x, values, layout, backend="reference")
    torch.testing.assert_close(masked_linear(x, values, layout, backend="native"), want)
