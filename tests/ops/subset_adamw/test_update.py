"""The update itself: kernels against the definition, the definition against torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sensikernels._core.bits import unpack_bits
from sensikernels.ops.subset_adamw.kept import KeptLayout
from sensikernels.optim import SubsetAdamW
from tests.ops.subset_adamw.cases import BACKENDS, KINDS, bits, kept_of, same_bits
from tests.tolerance import assert_close_to_reference

SHAPES = ((), (1,), (7,), (33,), (5, 1), (6, 40), (24, 35), (3, 1500), (4, 3, 5), (0, 4), (130, 70))


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = (0.1 * grad).to(param.dtype)


def parameters(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(d.bfloat16().to(dtype)) for d in draw]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector: a tolerance over errors needs many of them."""
    return torch.cat([t.detach().flatten() for t in tensors])


def run(
    dtype: torch.dtype,
    backend: str,
    kinds: list[str],
    *,
    steps: int = 4,
    change: bool = False,
    low: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    **options: Any,
) -> tuple[SubsetAdamW, list[nn.Parameter], list[tuple[Tensor, Tensor]]]:
    """A short run; gradients are those of ``low`` whatever ``dtype`` computes in."""
    params = parameters(shapes, dtype)
    optimizer = SubsetAdamW(params, lr=1e-2, weight_decay=0.1, backend=backend, **options)
    # A sum has one entry per row; a scalar is one row.
    sums = [
        (torch.zeros(max(p.shape[:1], default=1)), torch.zeros(max(p.shape[:1], default=1)))
        for p in params
    ]
    for i, (param, kind) in enumerate(zip(params, kinds, strict=True)):
        optimizer.set_kept(param, kept_of(kind, tuple(param.shape), i))
    for step in range(steps):
        if change and step == 2:
            for i, (param, kind) in enumerate(zip(params, kinds, strict=True)):
                optimizer.set_kept(param, kept_of(kind, tuple(param.shape), i + 50))
        gradients(params, step)
        for param in params:
            assert param.grad is not None
            param.grad = param.grad.to(low).to(dtype)
        optimizer.step(fused_statistics=dict(zip(params, sums, strict=True)))
    return optimizer, params, sums


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_everything_kept_is_torch_adamw(backend: str, clip: float | None) -> None:
    shapes = ((), (33,), (24, 35), (130, 70))
    ours, theirs, exact = (parameters(shapes, d) for d in (torch.float32,) * 2 + (torch.float64,))
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-7}
    optimizer = SubsetAdamW(ours, max_grad_norm=clip, backend=backend, **options)
    rivals = [torch.optim.AdamW(p, **options) for p in (theirs, exact)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 200) for o in (optimizer, *rivals)]
    for step in range(200):
        gradients(ours, step)
        for mine, torchs, wide in zip(ours, theirs, exact, strict=True):
            assert mine.grad is not None
            torchs.grad, wide.grad = mine.grad.clone(), mine.grad.double()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(theirs, clip)
            nn.utils.clip_grad_norm_(exact, clip)
        for one in (optimizer, *rivals):
            one.step()
        for one in schedules:
            one.step()
        if clip is not None:
            torch.testing.assert_close(optimizer.grad_norm, norm)
    assert_close_to_reference(flat(ours), flat(theirs), flat(exact))


@pytest.mark.parametrize("mode", ["hard_freeze", "as_published"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_backends_agree_with_float64(kind: str, mode: str, clip: float | None) -> None:
    kinds = [kind] * len(SHAPES)
    options = {"mode": mode, "change": True, "max_grad_norm": clip}
    exact_opt, exact, exact_sums = run(torch.float64, "reference", kinds, **options)
    same_opt, same, same_sums = run(torch.float32, "reference", kinds, **options)
    for backend in BACKENDS[1:]:
        optimizer, got, sums = run(torch.float32, backend, kinds, **options)
        assert_close_to_reference(flat(got), flat(same), flat(exact))
        for name in ("exp_avg", "exp_avg_sq"):
            states = (
                flat([one.state[p][name] for p in params])
                for one, params in ((optimizer, got), (same_opt, same), (exact_opt, exact))
            )
            assert_close_to_reference(*states)
        for which in range(2):
            mine, theirs, true = (
                flat([pair[which] for pair in s]) for s in (sums, same_sums, exact_sums)
            )
            assert_close_to_reference(mine, theirs, true.double())
        if clip is not None:
            torch.testing.assert_close(optimizer.grad_norm, exact_opt.grad_norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master", ["auto", False])
def test_low_precision(dtype: torch.dtype, kind: str, master: str | bool) -> None:
    kinds, options = [kind] * len(SHAPES), {"change": True, "low": dtype}
    _, exact, _ = run(torch.float64, "reference", kinds, **options)
    reference, same, _ = run(dtype, "reference", kinds, master_weights=master, **options)
    for backend in BACKENDS:
        optimizer, got, _ = run(dtype, backend, kinds, master_weights=master, **options)
        assert_close_to_reference(flat(got), flat(same), flat(exact))
        states = [optimizer.state[param] for param in got]
        assert all(state["exp_avg"].dtype == torch.float32 for state in states)
        assert all(("master" in state) == (master == "auto") for state in states)
        if master == "auto":
            layouts = [optimizer._layout(param) for param in got]
            for state, layout, param in zip(states, layouts, got, strict=True):
                wide = layout.live(state["master"])
                assert same_bits(layout.gather(param.detach()), wide.to(dtype))

            def masters(held: list[dict[str, Tensor]], at: list[KeptLayout] = layouts) -> Tensor:
                return flat([a.live(s["master"]) for a, s in zip(at, held, strict=True)])

            single = masters([reference.state[param] for param in same])
            true = [at.gather(param.detach()) for at, param in zip(layouts, exact, strict=True)]
            assert_close_to_reference(masters(states), single, flat(true))


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=len(SHAPES), max_size=len(SHAPES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    clip=st.sampled_from([None, 1.0]),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_frozen_entries_keep_their_bits(
    backend: str, kinds: list[str], dtype: torch.dtype, clip: float | None, share: float
) -> None:
    backend = "reference" if dtype == torch.float64 else backend
    params = parameters(SHAPES, dtype)
    before = [p.detach().clone() for p in params]
    optimizer = SubsetAdamW(params, lr=0.1, weight_decay=0.5, max_grad_norm=clip, backend=backend)
    for i, (param, kind) in enumerate(zip(params, kinds, strict=True)):
        optimizer.set_kept(param, kept_of(kind, tuple(param.shape), i, share))
    for step in range(3):
        gradients(params, step)
        optimizer.step()
    moved: list[Tensor] = []
    for old, param in zip(before, params, strict=True):
        layout = optimizer._layout(param)
        frozen = ~layout.flags()
        assert torch.equal(bits(param[frozen]), bits(old[frozen]))
        assert optimizer.state[param]["exp_avg"].numel() == layout.count
        moved.append((param != old)[~frozen].float())
    assert not flat(moved).numel() or flat(moved).mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["hard_freeze", "as_published"])
def test_thread_count_and_storage_do_not_change_bits(kind: str, mode: str) -> None:
    shapes = ((300, 512), (70000,), (12, 9000))
    threads = torch.get_num_threads()
    results = []
    try:
        for count, shift in ((1, 0), (2, 0), (2, 1)):
            torch.set_num_threads(count)
            params = parameters(shapes, torch.float32)
            for param in params:
                room = torch.zeros(param.numel() + shift)[shift:]
                param.data = room.view(param.shape).copy_(param.data)
            optimizer = SubsetAdamW(params, lr=0.1, max_grad_norm=0.1, mode=mode)
            for i, param in enumerate(params):
                optimizer.set_kept(param, kept_of(kind, tuple(param.shape), i))
            sums = {p: (torch.zeros(p.shape[0]), torch.zeros(p.shape[0])) for p in params}
            for step in range(2):
                gradients(params, step)
                optimizer.step(fused_statistics=sums)
            sums_flat = [t for pair in sums.values() for t in pair]
            results.append([*params, *sums_flat, optimizer.grad_norm])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_parameters_and_gradients(backend: str) -> None:
    plain, strided = (parameters(((6, 40), (24, 35)), torch.float32) for _ in range(2))
    for param in strided:
        param.data = param.data.t().contiguous().t()
    for params in (plain, strided):
        optimizer = SubsetAdamW(params, lr=0.1, backend=backend)
        optimizer.set_kept(params[0], kept_of("columns", (6, 40), 3))
        for step in range(3):
            gradients(params, step)
            for param in params:
                assert param.grad is not None
                param.grad = param.grad.t().contiguous().t()
            optimizer.step()
    assert strided[0].stride() == (1, 6)
    assert all(same_bits(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_what_is_documented(backend: str, value: float) -> None:
    for clip in (None, 1.0):
        params = parameters(((4, 20), (9,)), torch.float32)
        optimizer = SubsetAdamW(params, lr=0.1, backend=backend, max_grad_norm=clip)
        optimizer.set_kept(params[0], ("rows", torch.tensor([1, 2], dtype=torch.int32)))
        gradients(params, 0)
        assert params[0].grad is not None
        params[0].grad[1, 3] = value
        params[0].grad[0, 0] = float("nan")  # frozen: nobody reads it
        optimizer.step()
        wrong = ~torch.cat([p.detach().flatten() for p in params]).isfinite()
        if clip is not None and value != value:
            kept = torch.zeros(4, 20, dtype=torch.bool)
            kept[1:3] = True
            assert torch.equal(wrong, torch.cat((kept.flatten(), torch.ones(9).bool())))
        else:
            assert wrong.nonzero().flatten().tolist() == [23]


@pytest.mark.parametrize("backend", BACKENDS)
def test_late_entries_have_their_own_bias_correction(backend: str) -> None:
    param = nn.Parameter(torch.ones(4, 40))
    optimizer = SubsetAdamW([param], lr=1e-3, weight_decay=0.0, backend=backend)
    optimizer.set_kept(param, ("rows", torch.tensor([0], dtype=torch.int32)))
    for kept in ([0], [0, 2], [0, 2, 3]):
        optimizer.set_kept(param, ("rows", torch.tensor(kept, dtype=torch.int32)))
        for _ in range(5):
            param.grad = torch.full_like(param, 3.0)
            optimizer.step()
    # A constant gradient moves each entry by lr per step it took part in.
    moved = (1 - param.detach()).mean(1) / 1e-3
    torch.testing.assert_close(moved, torch.tensor([15.0, 0, 10, 5]), rtol=1e-3, atol=0)


def test_more_than_256_changes_of_the_kept_rows() -> None:
    """Under a constant gradient every step of a right bias correction is one of ``lr``."""
    param = nn.Parameter(torch.ones(300, 2))
    optimizer = SubsetAdamW([param], lr=1e-3, weight_decay=0.0)
    for step in range(300):
        optimizer.set_kept(param, ("rows", torch.arange(step + 1, dtype=torch.int32)))
        param.grad = torch.ones_like(param)
        optimizer.step()
    starts = optimizer.state[param]["cohort_start"]
    assert starts.tolist() == list(range(44, 300))
    error = (param[:, 0] - (1 - 1e-3 * torch.arange(300, 0, -1))).abs()
    assert error[44:].max() < 2e-5
    assert error[:44].max() < 2e-3


def test_cohorts_without_entries_are_used_again() -> None:
    param = nn.Parameter(torch.ones(600, 2))
    optimizer = SubsetAdamW([param], lr=1e-3)
    for step in range(300):
        optimizer.set_kept(param, ("rows", torch.arange(2 * step, 2 * step + 2).int()))
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["cohort_start"].tolist() == [0.0, 299.0] + [0.0] * 254
    assert bool((param[2:].sub(param[2]).abs() < 1e-5).all())


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_hundred_million_entries(threads: int) -> None:
    """A step from a gradient of ones, a quarter kept by bits, bound by bound with the formula."""
    count, before = 100_000_003, torch.get_num_threads()
    packed = torch.randint(0, 256, (-(-count // 8),), dtype=torch.uint8)
    packed &= torch.randint(0, 256, packed.shape, dtype=torch.uint8)
    packed[-1] &= (1 << count % 8) - 1
    weight = nn.Parameter(torch.full((count,), 2.0))
    weight.grad = torch.ones(count)
    optimizer = SubsetAdamW([weight], lr=0.5, weight_decay=0.5, backend="native")
    optimizer.set_kept(weight, ("elements", packed))
    torch.set_num_threads(threads)
    try:
        optimizer.step()
    finally:
        torch.set_num_threads(before)
    kept = unpack_bits(packed, count)
    torch.testing.assert_close(
        weight.detach(), torch.where(kept, 2.0 * 0.75 - 0.5, 2.0), rtol=1e-6, atol=0
    )
    assert optimizer.state[weight]["exp_avg"].numel() == int(kept.sum())
