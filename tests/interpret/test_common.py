"""GELU in registers, compacting copies, and which configuration a shape gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sensikernels.layouts import kept_values
from tests import kernel_checks as checks

pytestmark = pytest.mark.interpret


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """The epilogue's GELU of every finite entry, through a product with the identity."""
    from sensikernels.ops.masked_linear.triton_compact import compact_linear

    table = F.pad(x, (0, -len(x) % 128)).view(-1, 128)
    y, pre = compact_linear(table, torch.eye(128), None, 128, gelu=True)
    assert torch.equal(pre, table)
    return y.flatten()[: len(x)]


def test_gelu_is_within_a_few_float32_roundings_of_exact_in_both_tails():
    x = torch.linspace(-9, 9, 20001)
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    error = (_gelu(x).double() - exact).abs()
    assert error.max() <= (F.gelu(x).double() - exact).abs().max()
    relative = error / exact.abs().clamp(min=1e-30)
    assert relative.max() < 4e-6  # half a bfloat16 ulp is 2e-3, half a float16 ulp 2.4e-4
    assert relative[x.abs() < 2].max() < 1e-6


def test_gelu_of_every_finite_bfloat16_rounds_as_the_exact_one_does():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.isfinite()].float()
    x = x[x > -12]  # below, the exact value leaves the normal numbers of float32
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    wrong = _gelu(x).bfloat16() != exact.float().bfloat16()
    assert wrong.sum() <= 4  # ties that two roundings break differently


def test_gelu_of_what_is_not_finite():
    x = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])  # PyTorch on CPU: NaN at infinity
    from sensikernels.ops.masked_linear.triton_compact import compact_linear

    y, _ = compact_linear(torch.zeros(3, 8), torch.zeros(4, 8), x, 4, gelu=True)
    assert y.isnan().tolist() == [[True, False, False, False]] * 3
    assert y[:, 1:].tolist() == [[float("inf"), 0.0, 0.0]] * 3


@pytest.mark.parametrize("pattern", ["rows", "columns", "heads", "one", "none"])
def test_repack_compact(pattern: str):
    from sensikernels.ops.common.triton_gather import take_kept

    layout = checks.compact(pattern, (80, 50), "cpu")
    tensors = [torch.randn(80, 50).half(), *(torch.randn(80, 50) for _ in range(3))]
    for got, source in zip(take_kept(tensors, layout), tensors, strict=True):
        assert torch.equal(got, kept_values(source, layout))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("block", [(32, 32), (24, 40)])
def test_repack_blocks_into_given_memory(block: tuple[int, int], compact: bool):
    from sensikernels.ops.common.triton_gather import take_kept

    layout = checks.blocks("ragged", block, (100, 130), "cpu", compact=compact)
    tensors = [torch.randn(100, 130).half(), torch.randn(100, 130), torch.randn(130, 100).t()]
    into = [torch.empty(layout.values_shape, dtype=t.dtype) for t in tensors]
    got = take_kept(tensors, layout, into)
    assert all(a is b for a, b in zip(got, into, strict=True))
    for mine, source in zip(got, tensors, strict=True):
        assert torch.equal(mine, kept_values(source, layout))


def test_gathered_columns_have_rows_of_whole_16_elements():
    from sensikernels.ops.common.triton_gather import gather_columns

    a, b = torch.randn(37, 50).half(), torch.randn(50, 37).half().t()
    index = torch.tensor([0, 3, 4, 49], dtype=torch.int32)
    got = gather_columns([a, b, a], [index, None, index[:1]])
    assert torch.equal(got, torch.cat([a[:, index.long()], b, a[:, :1]], 1))
    assert got.stride(0) % 16 == 0
    assert not got._base.isnan().any()


def test_every_block_shape_gets_a_configuration():
    from sensikernels.ops.common import triton_sdd
    from sensikernels.ops.masked_linear import triton_blocks

    for dtype in (torch.float32, torch.bfloat16):
        for size in (1, 8, 16, 24, 32, 48, 64, 96, 128, 200, 256):
            for other in (1, 16, 32, 40, 64, 128, 512):
                assert triton_sdd.select((size, other), dtype) in triton_sdd.CONFIGS
                for tokens in (1, 128, 100_000):
                    got = triton_blocks.select(size, other, tokens, 24, dtype, 132)
                    assert got in triton_blocks.CONFIGS


def test_every_shipped_configuration_is_chosen_by_some_shape():
    from sensikernels.ops.common import triton_sdd
    from sensikernels.ops.masked_linear import triton_blocks, triton_compact
    from sensikernels.ops.selective_linear import triton_rows

    dtypes, sizes = (torch.float32, torch.bfloat16), (16, 32, 64, 128)
    pairs = [(a, b, dtype) for a in sizes for b in sizes for dtype in dtypes]
    tokens = (1, 4096, 65536)
    sdd = {id(triton_sdd.select((a, b), dtype)) for a, b, dtype in pairs}
    assert sdd == {id(c) for c in triton_sdd.CONFIGS}
    blocks = {
        id(triton_blocks.select(a, b, t, 6, dtype, 132)) for a, b, dtype in pairs for t in tokens
    }
    assert blocks == {id(c) for c in triton_blocks.CONFIGS}
    compact = {
        id(triton_compact.select(t, n, dtype, 132, scattered=scattered))
        for t in tokens
        for n in (64, 768, 3072)
        for dtype in dtypes
        for scattered in (False, True)
    }
    assert compact == {id(c) for c in triton_compact.CONFIGS}
    rows = {id(triton_rows.select(a, b, dtype)) for a, b, dtype in pairs}
    assert rows == {id(c) for c in triton_rows.CONFIGS}


def test_a_device_with_little_shared_memory_gets_fewer_stages(monkeypatch: pytest.MonkeyPatch):
    from sensikernels.ops.common import triton_launch
    from sensikernels.ops.common.triton_configs import stage_bytes
    from sensikernels.ops.masked_linear.triton_blocks import CONFIGS

    x = torch.empty(1, dtype=torch.bfloat16)
    for kilobytes, hopper in ((99, False), (163, False), (227, True)):
        own = triton_launch.Device(processors=46, shared=kilobytes << 10, descriptors=hopper)
        monkeypatch.setattr(triton_launch, "INTERPRETED", own)
        for config in CONFIGS:
            fitted = triton_launch.fit(config, stage_bytes, x)
            buffers = fitted.stages if hopper else fitted.stages - 1
            assert buffers * stage_bytes(fitted.tile, 2) <= own.shared
            assert fitted.stages == config.stages or kilobytes == 99


def test_results_have_the_same_bits_every_time():
    from sensikernels.ops.selective_linear import triton as kernels

    layout = checks.compact("rows", (40, 48), "cpu")
    x, dy = torch.randn(100, 48), torch.randn(100, 40)
    checks.check_bitwise_repeatable(lambda: [kernels.selective_grad_values(dy, x, layout)])
