"""The kernels of masked_linear against PyTorch: every block, pattern and number of tokens."""

from __future__ import annotations

import pytest
import torch

from tests import kernel_checks as checks

pytestmark = pytest.mark.interpret
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("pattern", checks.PATTERNS)
def test_every_pattern_of_blocks(pattern: str):
    layout = checks.blocks(pattern, (32, 32), (128, 96), "cpu")
    checks.check_masked_linear(layout, tokens=70, dtype=FP32, device="cpu", activation="gelu")


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize(
    "block", [(64, 64), (128, 128), (32, 64), (64, 32), (128, 32), (32, 128), (16, 16), (64, 16)]
)
def test_every_block_shape(block: tuple[int, int]):
    layout = checks.blocks("random", block, (2 * block[0], 2 * block[1]), "cpu")
    checks.check_masked_linear(layout, tokens=65, dtype=FP16, device="cpu", activation="gelu")


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        ((32, 32), (100, 75)),
        ((64, 64), (65, 130)),
        ((48, 40), (96, 120)),
        ((8, 8), (50, 36)),
        ((160, 136), (300, 140)),
        ((20, 3), (60, 31)),
    ],
)
def test_blocks_cut_by_the_edge_or_of_odd_size(block: tuple[int, int], shape: tuple[int, int]):
    layout = checks.blocks("random", block, shape, "cpu")
    checks.check_masked_linear(layout, tokens=33, dtype=FP32, device="cpu", activation="gelu")


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 64, 129])
def test_any_number_of_tokens(tokens: int):
    layout = checks.blocks("ragged", (64, 32), (192, 96), "cpu")
    checks.check_masked_linear(layout, tokens=tokens, dtype=FP16, device="cpu")


@pytest.mark.parametrize("strides", ["sliced", "transposed"])
@pytest.mark.parametrize("bias", [True, False])
def test_strided_activations(strides: str, bias: bool):
    layout = checks.blocks("random", (32, 32), (96, 64), "cpu")
    checks.check_masked_linear(
        layout, tokens=40, dtype=FP32, device="cpu", activation="gelu", bias=bias, strides=strides
    )


def test_compact_ends():
    layout = checks.blocks("ragged", (32, 32), (128, 160), "cpu", compact=True)
    assert layout.in_width < 160
    assert layout.out_width < 128
    checks.check_masked_linear(layout, tokens=20, dtype=FP32, device="cpu", activation="gelu")


def test_bfloat16_blocks():
    layout = checks.blocks("random", (64, 64), (128, 128), "cpu")
    checks.check_masked_linear(layout, tokens=50, dtype=BF16, device="cpu")


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("pattern", ["rows", "columns", "heads", "one", "none", "all"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("ends", [(), ("compact_input",), ("compact_output",)], ids=str)
def test_compact(pattern: str, activation: str, ends: tuple[str, ...]):
    layout = checks.compact(pattern, (80, 104), "cpu", **dict.fromkeys(ends, True))
    checks.check_masked_linear(layout, tokens=37, dtype=FP32, device="cpu", activation=activation)


@pytest.mark.parametrize("tokens", [0, 1, 130])
@pytest.mark.parametrize("strides", ["sliced", "transposed"])
def test_compact_tokens_and_strides(tokens: int, strides: str):
    layout = checks.compact("rows", (70, 33), "cpu")
    checks.check_masked_linear(
        layout, tokens=tokens, dtype=FP16, device="cpu", activation="gelu", strides=strides
    )


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 7), (130, 64), (257, 100), (0, 16)])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_backward_activation(tokens: int, width: int, dtype: torch.dtype):
    checks.check_backward_activation(tokens, width, dtype=dtype, device="cpu")


@pytest.mark.parametrize("strides", ["sliced", "transposed"])
def test_backward_activation_strided(strides: str):
    checks.check_backward_activation(33, 40, dtype=FP32, device="cpu", strides=strides)


def test_layouts_by_element_are_refused():
    from sensikernels._core.errors import UsageError
    from sensikernels.layouts import layout_of
    from sensikernels.ops.masked_linear import triton as kernels

    layout = layout_of(torch.eye(4, dtype=torch.bool), (1, 1), (4, 4))
    with pytest.raises(UsageError, match="layout: expected compact or blocks"):
        kernels.masked_linear_forward(torch.ones(2, 4), torch.ones(4), layout, None, "none")
    layout = checks.compact("rows", (8, 8), "cpu")
    with pytest.raises(UsageError, match="x: expected one of"):
        kernels.masked_linear_grad_input(torch.ones(2, 8).double(), torch.ones(3, 8), layout)
