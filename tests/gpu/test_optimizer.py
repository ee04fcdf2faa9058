"""``SubsetAdamW`` on a GPU: the definition, the same bits, captured, never waited for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels.ops.subset_adamw import native
from sensikernels.optim import SubsetAdamW
from tests.gpu.captures import captured, no_waiting
from tests.ops.subset_adamw.cases import KINDS, kept_of, same_bits
from tests.tolerance import assert_close_to_reference

pytestmark = pytest.mark.gpu
SHAPES = [(768, 768), (768,), (96, 640), (30, 1001), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernel() -> None:
    refusal = native.why_not(torch.device("cuda"), {torch.float32})
    if refusal:
        pytest.skip(refusal)


def parameters(dtype: torch.dtype, device: str = "cuda") -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s).to(dtype).to(device)) for s in SHAPES]


def gradients(params: list[nn.Parameter], seed: int) -> None:
    """New gradients in the memory of the old ones."""
    torch.manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape).to(param)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def optimizer_of(params: list[nn.Parameter], kind: str, **options: Any) -> SubsetAdamW:
    optimizer = SubsetAdamW(params, **{"lr": 1e-2, **options})
    for i, param in enumerate(params):
        optimizer.set_kept(param, kept_of(kind, tuple(param.shape), i))
    return optimizer


def run(dtype: torch.dtype, device: str, kind: str, backend: str, **options: Any) -> list[Tensor]:
    params = parameters(dtype, device)
    optimizer = optimizer_of(params, kind, backend=backend, **options)
    for seed in range(3):
        gradients(params, seed)
        optimizer.step()
    return [p.detach().cpu() for p in params]


@pytest.mark.parametrize("mode", ["hard_freeze", "as_published"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_against_float64(kind: str, mode: str, clip: float | None):
    options = {"mode": mode, "max_grad_norm": clip}
    got = run(torch.float32, "cuda", kind, "native", **options)
    same = run(torch.float32, "cuda", kind, "reference", **options)
    exact = run(torch.float64, "cpu", kind, "reference", **options)
    for mine, other, wide, start in zip(got, same, exact, parameters(torch.float32), strict=True):
        start64 = start.detach().cpu().double()
        frozen = wide == start64
        assert mode != "hard_freeze" or torch.equal(mine.double()[frozen], start64[frozen])
        assert_close_to_reference(mine, other, wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_repeat(kind: str, dtype: torch.dtype):
    one, two = (run(dtype, "cuda", kind, "native", max_grad_norm=0.5) for _ in range(2))
    assert all(map(same_bits, one, two))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_with_a_rate_on_the_device(kind: str, dtype: torch.dtype):
    rate = torch.tensor(1e-2, device="cuda")
    params = parameters(dtype)
    optimizer = optimizer_of(params, kind, lr=rate, max_grad_norm=0.5)
    plain = parameters(dtype)
    eager = optimizer_of(plain, kind, lr=1e-2, max_grad_norm=0.5)
    gradients(params, 0)
    gradients(plain, 0)

    def step() -> list[Tensor]:
        optimizer.step()
        assert optimizer.grad_norm is not None
        return [optimizer.grad_norm]

    graph, (norm,) = captured(step)  # one step beside the graph; capturing runs none
    eager.step()
    for seed in range(1, 4):
        rate.fill_(1e-2 / seed)
        eager.param_groups[0]["lr"] = float(rate)
        gradients(params, seed)
        gradients(plain, seed)
        graph.replay()
        eager.step()
        assert eager.grad_norm is not None
        assert same_bits(norm, eager.grad_norm)
    assert all(map(same_bits, params, plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits(kind: str):
    params = parameters(torch.float32)
    optimizer = optimizer_of(params, kind, max_grad_norm=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    gradients(params, 0)
    optimizer.step()
    schedule.step()
    with no_waiting():
        optimizer.step()


def test_grad_scaler_skips_and_unscales():
    plain, scaled = parameters(torch.float32), parameters(torch.float32)
    optimizers = [optimizer_of(p, "rows", max_grad_norm=0.5) for p in (plain, scaled)]
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))
    for seed in range(3):
        gradients(plain, seed)
        gradients(scaled, seed)
        for param in scaled:
            assert param.grad is not None
            param.grad.mul_(1024.0)
        optimizers[0].step()
        if seed == 1:
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
    for mine, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    before = copy.deepcopy([p.detach() for p in scaled])
    assert scaled[0].grad is not None
    scaled[0].grad[0, :] = float("inf")
    scaler.step(optimizers[1])
    scaler.update()
    assert all(map(same_bits, before, scaled))
    assert scaler.get_scale() == 512.0


def test_everything_kept_is_torch_adamw():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    first, second = SubsetAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for seed in range(20):
        gradients(ours, seed)
        gradients(theirs, seed)
        first.step()
        second.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_rows_are_the_definition_and_repeat(dtype: torch.dtype):
    """Rows named once, often, and never; the bits repeat, and no step waits."""
    torch.manual_seed(0)
    start, found = torch.randn(500, 300).to(dtype), []
    for backend in ("native", "native", "reference"):
        table = nn.Parameter(start.cuda())
        optimizer = SubsetAdamW([table], lr=1e-2, max_grad_norm=0.5, backend=backend)
        for seed in range(4):
            made = torch.Generator().manual_seed(seed)
            rows = torch.randint(0, 300, (1, 900), generator=made)
            rows[0, :200] = 7
            values = torch.randn(900, 300, generator=made).to(dtype)
            table.grad = torch.sparse_coo_tensor(rows, values, table.shape).cuda()
            if seed:
                with no_waiting():
                    optimizer.step()
            else:
                optimizer.step()
        optimizer.flush()
        found.append(table.detach())
    assert same_bits(found[0], found[1])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0], found[2], rtol=tolerance, atol=tolerance)
