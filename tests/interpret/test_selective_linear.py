"""The kernels of selective_linear against PyTorch: every pattern of kept entries."""

from __future__ import annotations

import pytest
import torch

from sensikernels.layouts import BlockLayout, CompactLayout, layout_of
from tests import kernel_checks as checks

pytestmark = pytest.mark.interpret
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("pattern", ["rows", "columns", "heads", "one", "none", "all"])
@pytest.mark.parametrize("saved", [False, True])
def test_compact(pattern: str, saved: bool):
    layout = checks.compact(pattern, (80, 96), "cpu")
    checks.check_grad_values([layout], tokens=67, dtype=FP32, device="cpu", saved=saved)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("pattern", checks.PATTERNS)
def test_every_pattern_of_blocks(pattern: str):
    layout = checks.blocks(pattern, (32, 32), (96, 160), "cpu")
    checks.check_grad_values([layout], tokens=40, dtype=FP16, device="cpu", saved=True)


@pytest.mark.parametrize("tokens", [0, 1, 5, 63, 130])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype):
    rows = checks.compact("rows", (33, 50), "cpu")
    checks.check_grad_values([rows], tokens=tokens, dtype=dtype, device="cpu", saved=False)
    blocks = checks.blocks("ragged", (64, 32), (128, 96), "cpu")
    checks.check_grad_values([blocks], tokens=tokens, dtype=dtype, device="cpu", saved=False)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("tokens", [129, 300])
def test_tokens_are_split(tokens: int, monkeypatch: pytest.MonkeyPatch):
    from sensikernels.ops.common import triton_launch

    monkeypatch.setattr(triton_launch, "SPLIT_TOKENS", 64)
    blocks = checks.blocks("one", (64, 64), (128, 128), "cpu")
    rows = checks.compact("heads", (48, 64), "cpu")
    for layout in (blocks, rows):
        checks.check_grad_values([layout], tokens=tokens, dtype=FP32, device="cpu", saved=False)


@pytest.mark.parametrize("kept", [("rows", "heads", "one"), ("all", "rows"), ("none", "rows")])
def test_compact_linears_that_share_x(kept: tuple[str, ...]):
    layouts = [checks.compact(one, (64, 72), "cpu") for one in kept]
    checks.check_grad_values(layouts, tokens=50, dtype=FP32, device="cpu", saved=False)


@pytest.mark.parametrize("block", [(32, 32), (64, 64), (16, 32), (24, 40)])
@pytest.mark.parametrize("kept", [("random", "ragged", "one"), ("empty", "one_row"), ("full",) * 3])
def test_linears_of_blocks_that_share_x(block: tuple[int, int], kept: tuple[str, ...]):
    sizes = [(96, 128), (160, 128), (70, 128)]
    layouts = [
        checks.blocks(one, block, size, "cpu") for one, size in zip(kept, sizes, strict=False)
    ]
    checks.check_grad_values(layouts, tokens=50, dtype=FP32, device="cpu", saved=False)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("block", [(32, 32), (64, 64), (24, 40)])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_linears_of_blocks_that_read_other_columns(block: tuple[int, int], dtype: torch.dtype):
    from sensikernels.ops.selective_linear.grouped import joined

    layouts = [
        checks.blocks(one, block, (size, 270), "cpu", compact=True)
        for one, size in (("ragged", 3 * block[0]), ("ragged", 4 * block[0]), ("random", 150))
    ]
    assert len({one.in_width for one in layouts}) > 1
    checks.check_grad_values(
        list(joined(layouts)), tokens=45, dtype=dtype, device="cpu", saved=True
    )


def test_compact_blocks_save_only_the_columns_they_read():
    from sensikernels.ops.selective_linear import triton as kernels

    layout = checks.blocks("ragged", (32, 32), (128, 160), "cpu", compact=True)
    x = torch.randn(20, 160)
    saved = kernels.selective_save(x, layout)
    assert saved.shape[1] == layout.in_width < 160
    assert torch.equal(saved, x[:, layout.columns.long()])
    checks.check_grad_values([layout], tokens=20, dtype=FP32, device="cpu", saved=True)


def test_nothing_of_x_is_saved_when_only_the_bias_trains():
    from sensikernels.ops.selective_linear import triton as kernels

    layout = checks.compact("none", (16, 24), "cpu")
    assert kernels.selective_save(torch.randn(3, 24), layout) is None


def test_what_cannot_share_a_product_is_refused():
    from sensikernels._core.errors import UsageError
    from sensikernels.ops.selective_linear import triton as kernels

    x, dy = torch.randn(4, 32), torch.randn(4, 32)
    rows = checks.compact("rows", (32, 32), "cpu")
    blocks = checks.blocks("random", (16, 16), (32, 32), "cpu")
    wide = checks.blocks("random", (16, 32), (32, 32), "cpu")
    columns = checks.compact("columns", (32, 32), "cpu")
    assert isinstance(rows, CompactLayout)
    assert isinstance(blocks, BlockLayout)
    for layouts, message in [
        ([rows, blocks], "all compact or all blocks"),
        ([rows, columns], "the same kept columns"),
        ([blocks, wide], "blocks of one shape"),
        ([rows] * 4, "1 to 3"),
    ]:
        with pytest.raises(UsageError, match=message):
            kernels.selective_grad_values_grouped([dy] * len(layouts), x, layouts)
    elements = layout_of(torch.eye(32, dtype=torch.bool), (1, 1), (32, 32))
    with pytest.raises(UsageError, match="layouts: expected all compact or all blocks"):
        kernels.selective_grad_values(dy, x, elements)
