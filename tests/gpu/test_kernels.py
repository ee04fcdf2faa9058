"""The checks of ``tests/kernel_checks.py`` on a GPU, at sizes that fill it, and captured graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sensikernels.layouts import BlockLayout, kept_values
from tests import kernel_checks as checks
from tests.gpu.captures import captured, rewrite

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["highest", "high"], autouse=True)
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """float32 in both of torch's settings; half precision tests run once."""
    half = "dtype" in request.fixturenames and request.getfixturevalue("dtype") != torch.float32
    if half and request.param == "high":
        pytest.skip("the setting concerns float32 only")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["as chosen", "pointers"])
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from sensikernels.ops.common import triton_launch

    if request.param == "pointers":
        monkeypatch.setattr(triton_launch, "can_describe", lambda *_: False)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", checks.PATTERNS)
def test_every_pattern_of_blocks(pattern: str, dtype: torch.dtype):
    layout = checks.blocks(pattern, (64, 64), (768, 512), "cuda")
    checks.check_masked_linear(layout, tokens=1000, dtype=dtype, device="cuda", activation="gelu")
    checks.check_grad_values([layout], tokens=1000, dtype=dtype, device="cuda", saved=False)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17, 128, 4096])
@pytest.mark.parametrize(
    "block", [(32, 32), (64, 64), (128, 128), (32, 64), (64, 32), (128, 32), (32, 128), (16, 16)]
)
def test_every_block_shape(block: tuple[int, int], tokens: int, dtype: torch.dtype):
    layout = checks.blocks("random", block, (768, 384), "cuda")
    checks.check_masked_linear(layout, tokens=tokens, dtype=dtype, device="cuda", activation="gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("block", "shape"),
    [
        ((32, 32), (100, 75)),
        ((64, 64), (65, 130)),
        ((48, 40), (96, 120)),
        ((8, 8), (50, 36)),
        ((256, 192), (300, 200)),
        ((20, 3), (60, 31)),
    ],
)
@pytest.mark.parametrize("strides", ["contiguous", "sliced", "transposed"])
def test_blocks_cut_by_the_edge_or_of_odd_size(
    block: tuple[int, int], shape: tuple[int, int], strides: str, dtype: torch.dtype
):
    layout = checks.blocks("random", block, shape, "cuda")
    checks.check_masked_linear(
        layout, tokens=133, dtype=dtype, device="cuda", activation="gelu", strides=strides
    )
    checks.check_grad_values([layout] * 3, tokens=133, dtype=dtype, device="cuda", saved=True)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["rows", "columns", "heads", "one", "none", "all"])
@pytest.mark.parametrize("ends", [(), ("compact_input",), ("compact_output",)], ids=str)
def test_compact(pattern: str, ends: tuple[str, ...], dtype: torch.dtype):
    layout = checks.compact(pattern, (320, 776), "cuda", **dict.fromkeys(ends, True))
    for activation in ("none", "gelu"):
        checks.check_masked_linear(
            layout, tokens=517, dtype=dtype, device="cuda", activation=activation
        )


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 300, 4096])
def test_linears_that_share_x(tokens: int, dtype: torch.dtype):
    rows = [checks.compact(one, (768, 768), "cuda") for one in ("rows", "heads", "one")]
    checks.check_grad_values(rows, tokens=tokens, dtype=dtype, device="cuda", saved=False)
    for block in ((32, 32), (64, 64), (128, 128)):
        blocks = [
            checks.blocks(one, block, (768, 768), "cuda") for one in ("random", "ragged", "one")
        ]
        checks.check_grad_values(blocks, tokens=tokens, dtype=dtype, device="cuda", saved=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (130, 64), (4096, 3072), (0, 16)])
def test_backward_activation(tokens: int, width: int, dtype: torch.dtype):
    checks.check_backward_activation(tokens, width, dtype=dtype, device="cuda")


@pytest.mark.parametrize("block", [(32, 32), (64, 64)])
def test_results_have_the_same_bits_every_time(block: tuple[int, int]):
    from sensikernels.ops.masked_linear import triton as masked
    from sensikernels.ops.selective_linear import triton as selective

    layout = checks.blocks("random", block, (768, 768), "cuda")
    rows = checks.compact("rows", (768, 768), "cuda")
    x, dy = torch.randn(2, 4096, 768, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(layout.values_shape, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        dpre, bias = masked.masked_linear_backward_activation(dy, x)
        return [
            masked.masked_linear_forward(x, values, layout, None, "none")[0],
            masked.masked_linear_grad_input(dy, values, layout),
            masked.masked_linear_grad_values(dy, x, layout),
            selective.selective_grad_values(dy, x, rows),
            dpre,
            bias,
        ]

    checks.check_bitwise_repeatable(run)


def test_repack_in_one_launch():
    from sensikernels.ops.common.triton_gather import take_kept

    for layout in (
        checks.compact("rows", (768, 3072), "cuda"),
        checks.compact("columns", (768, 3072), "cuda"),
        checks.blocks("random", (32, 64), (768, 3072), "cuda"),
    ):
        tensors = [torch.randn(768, 3072, device="cuda") for _ in range(4)]
        tensors[0] = tensors[0].bfloat16()
        for got, source in zip(take_kept(tensors, layout), tensors, strict=True):
            assert torch.equal(got, kept_values(source, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_step_follows_a_change_of_mask(dtype: torch.dtype):
    """Same count of blocks, other blocks: indices and values are rewritten, the graph stays."""
    from sensikernels.ops.common.triton_gather import take_kept
    from sensikernels.ops.masked_linear import triton as kernels

    def layout_of_rows(first: int) -> BlockLayout:
        kept = torch.zeros(12, 6, dtype=torch.bool)
        kept.view(-1)[torch.randperm(72)[:30]] = True
        kept = kept.roll(first, 0)
        return checks.blocks_of(kept, (64, 64), (768, 384), "cuda")

    layout, other = layout_of_rows(0), layout_of_rows(5)
    weight = torch.randn(768, 384, device="cuda", dtype=dtype)
    x = torch.randn(700, 384, device="cuda", dtype=dtype)
    dy = torch.randn(700, 768, device="cuda", dtype=dtype)
    bias = torch.randn(768, device="cuda", dtype=dtype)
    values = take_kept([weight], layout)[0]

    def step(one: BlockLayout, kept: Tensor) -> list[Tensor]:
        y, pre = kernels.masked_linear_forward(x, kept, one, bias, "gelu")
        dpre, dbias = kernels.masked_linear_backward_activation(dy, pre)
        dx = kernels.masked_linear_grad_input(dpre, kept, one)
        return [y, dx, kernels.masked_linear_grad_values(dpre, x, one), dbias]

    graph, out = captured(lambda: step(layout, values))
    for change in (False, True):
        if change:
            rewrite(layout, other)
            take_kept([weight], layout, [values])
        for tensor in out:
            tensor.fill_(float("nan"))
        graph.replay()
        for mine, eager in zip(out, step(layout, values.clone()), strict=True):
            assert torch.equal(mine, eager)
