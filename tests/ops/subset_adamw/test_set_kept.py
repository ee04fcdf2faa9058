"""``SubsetAdamW.set_kept``: a change of the same kind and count moves no address."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._core.bits import pack_bits
from sensikernels._core.errors import UsageError
from sensikernels.ops.subset_adamw.api import MODES
from sensikernels.ops.subset_adamw.kept import KeptLayout
from sensikernels.optim import SubsetAdamW
from tests.ops.subset_adamw.cases import BACKENDS, same_bits

SHAPE = (24, 40)


UNITS = {"rows": 24, "columns": 40, "blocks": 30, "elements": 960}


def choice(kind: str, seed: int, less: int = 0) -> tuple[Any, ...]:
    """A third of the units of ``kind``, the same count for every seed, or some fewer."""
    units = UNITS[kind]
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    kept = order[: units // 3 - less].sort().values.int()
    if kind == "elements":
        flags = torch.zeros(units, dtype=torch.bool)
        flags[kept.long()] = True
        return kind, pack_bits(flags)
    return (kind, kept, (4, 8)) if kind == "blocks" else (kind, kept)


def train(kind: str, mode: str, backend: str, dtype: torch.dtype) -> tuple[Tensor, list[Any]]:
    """The weight and, after each change of what is kept, addresses and copies of the state."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_()
    optimizer = SubsetAdamW([weight], lr=0.1, mode=mode, backend=backend)
    seen = []
    for seed in range(5):
        optimizer.set_kept(weight, choice(kind, seed))
        for _ in range(2):
            weight.grad = torch.randn(SHAPE, generator=generator).to(dtype)
            optimizer.step()
        own = optimizer.state[weight]
        held = {n: t for n, t in (*own.items(), *own["kept"].items()) if isinstance(t, Tensor)}
        seen.append(
            ({n: t.data_ptr() for n, t in held.items()}, {n: t.clone() for n, t in held.items()})
        )
    return weight, seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("rows", "columns", "blocks", "elements") for mode in MODES],
)
def test_addresses_stay_and_results_are_those_of_new_buffers(
    kind: str, mode: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, seen = train(kind, mode, backend, dtype)
    assert all(addresses == seen[0][0] for addresses, _ in seen)
    assert ("cohort" in seen[0][0]) == (mode == "hard_freeze")
    monkeypatch.setattr(KeptLayout, "write_to", lambda self, saved: False)
    anew, again = train(kind, mode, backend, dtype)
    assert again[-1][0]["index"] != again[-2][0]["index"]
    assert same_bits(weight, anew)
    for (_, mine), (_, other) in zip(seen, again, strict=True):
        assert mine.keys() == other.keys()
        assert all(same_bits(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rows", "blocks", "elements"])
@pytest.mark.parametrize("mode", MODES)
def test_fewer_entries_leave_room(
    kind: str, mode: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and live moments are those of buffers that fit; the file of either one resumes."""

    def run() -> tuple[Tensor, SubsetAdamW, list[dict[str, int]]]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_()
        optimizer = SubsetAdamW([weight], lr=0.1, mode=mode, backend=backend, max_grad_norm=1.0)
        seen = []
        for seed, less in enumerate((0, 3, 7, 1, 8 if kind == "rows" else 9)):
            optimizer.set_kept(weight, choice(kind, seed, less))
            for _ in range(2):
                weight.grad = torch.randn(SHAPE, generator=generator).to(dtype)
                optimizer.step()
            own = optimizer.state[weight]
            held = {**own, **own["kept"]}
            seen.append({n: t.data_ptr() for n, t in held.items() if isinstance(t, Tensor)})
        again = torch.empty_like(weight).copy_(weight).detach().requires_grad_()
        resumed = SubsetAdamW([again], lr=0.1, mode=mode, backend=backend, max_grad_norm=1.0)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for param, one in ((weight, optimizer), (again, resumed)):
            one.set_kept(param, choice(kind, 9))
            param.grad = torch.ones_like(param)
            one.step()
        assert same_bits(weight, again)
        assert resumed.state[again]["kept"]["room"] == optimizer.state[weight]["kept"]["room"]
        return weight, optimizer, seen

    weight, optimizer, seen = run()
    assert all(addresses == seen[0] for addresses in seen)
    monkeypatch.setattr(KeptLayout, "in_room_of", lambda self, other: self)
    anew, fitting, _ = run()
    assert same_bits(weight, anew)
    for name in ("exp_avg", "exp_avg_sq"):
        mine, its = (
            one.state[p][name]
            if mode == "as_published"
            else one._layout(p).live(one.state[p][name])
            for one, p in ((optimizer, weight), (fitting, anew))
        )
        assert same_bits(mine, its)


@pytest.mark.parametrize("kind", ["rows", "blocks", "elements"])
def test_a_capacity_is_room_for_more_and_all(kind: str) -> None:
    weight = torch.randn(SHAPE, requires_grad=True)
    optimizer = SubsetAdamW([weight], lr=0.1)
    optimizer.set_kept(weight, choice(kind, 0), capacity=UNITS[kind])
    for step, kept in enumerate((choice(kind, 1), None, choice(kind, 2, 3), None)):
        optimizer.set_kept(weight, kept)
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert torch.equal(weight != before, optimizer._layout(weight).flags())
        own = optimizer.state[weight]
        tensors = [t for t in (*own.values(), *own["kept"].values()) if isinstance(t, Tensor)]
        if step == 0:
            first = tensors
        assert all(a is b for a, b in zip(tensors, first, strict=True))
    assert own["exp_avg"].numel() == weight.numel()
    optimizer.set_kept(weight, choice("columns", 0))
    optimizer.set_kept(weight, None)
    assert "kept" not in own


@pytest.mark.parametrize(
    ("kept", "capacity", "message"),
    [
        (("rows", torch.arange(3).int()), 25, "capacity: expected at most 24 rows, got 25"),
        (("elements", torch.zeros(120, dtype=torch.uint8)), 961, "expected at most 960 elements"),
        (("columns", torch.arange(3).int()), 4, "capacity: expected none for columns"),
        (None, 4, "capacity: expected None, as no kind of unit is named"),
        (("rows", torch.arange(3).int()), -1, "capacity: expected at most 24 rows, got -1"),
    ],
)
def test_what_a_capacity_refuses(kept: Any, capacity: int, message: str) -> None:
    weight = torch.zeros(SHAPE, requires_grad=True)
    optimizer = SubsetAdamW([weight])
    with pytest.raises(UsageError, match=message):
        optimizer.set_kept(weight, kept, capacity=capacity)
    assert "kept" not in optimizer.state[weight]


def test_a_larger_count_or_another_kind_is_laid_out_anew() -> None:
    weight = torch.zeros(SHAPE, requires_grad=True)
    optimizer = SubsetAdamW([weight])
    optimizer.set_kept(weight, choice("rows", 0))
    kept = optimizer.state[weight]["kept"]["index"]
    before = kept.clone()
    for other in (("rows", torch.arange(9, dtype=torch.int32)), choice("columns", 0), None):
        optimizer.set_kept(weight, other)
        assert torch.equal(kept, before)
    assert "kept" not in optimizer.state[weight]


def test_a_copy_shares_what_is_kept() -> None:
    """A captured step holds a copy of the optimizer: its kernels read the same index."""
    weight = torch.zeros(SHAPE, requires_grad=True)
    optimizer = SubsetAdamW([weight])
    optimizer.set_kept(weight, choice("elements", 0))
    other = copy.copy(optimizer)
    layouts = [o._layout(weight) for o in (optimizer, other)]
    optimizer.set_kept(weight, choice("elements", 1))
    assert optimizer._layout(weight).index is layouts[1].index
    assert torch.equal(layouts[1].index, choice("elements", 1)[1])
    assert layouts[0].offsets.data_ptr() == layouts[1].offsets.data_ptr()
