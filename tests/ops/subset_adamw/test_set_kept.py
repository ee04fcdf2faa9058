"""``SubsetAdamW.set_kept``: a change of the same kind and count moves no address."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._bits import pack_bits
from sensikernels.ops.subset_adamw import SubsetAdamW
from sensikernels.ops.subset_adamw.kept import KeptLayout
from tests.ops.subset_adamw.cases import BACKENDS, same_bits

SHAPE = (24, 40)


def choice(kind: str, seed: int) -> tuple[Any, ...]:
    """A third of the units of ``kind``, the same count for every seed."""
    units = {"rows": 24, "columns": 40, "blocks": 30, "elements": 960}[kind]
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    kept = order[: units // 3].sort().values.int()
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
        seen.append(({n: t.data_ptr() for n, t in held.items()},
                     {n: t.clone() for n, t in held.items()}))  # fmt: skip
    return weight, seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "hard_freeze") for kind in ("rows", "columns", "blocks", "elements")]
    + [("elements", "as_published")],
)
def test_addresses_stay_and_results_are_those_of_new_buffers(
    kind: str, mode: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, seen = train(kind, mode, backend, dtype)
    first = 1 if mode == "hard_freeze" else 0  # the first change makes the index of cohorts
    assert all(addresses == seen[first][0] for addresses, _ in seen[first:])
    assert ("cohort" in seen[first][0]) == (mode == "hard_freeze")
    monkeypatch.setattr(KeptLayout, "take_", lambda self, other: False)
    anew, again = train(kind, mode, backend, dtype)
    assert again[-1][0]["index"] != again[-2][0]["index"]
    assert same_bits(weight, anew)
    for (_, mine), (_, other) in zip(seen, again, strict=True):
        assert mine.keys() == other.keys()
        assert all(same_bits(mine[name], other[name]) for name in mine)


def test_another_count_or_kind_is_laid_out_anew() -> None:
    weight = torch.zeros(SHAPE, requires_grad=True)
    optimizer = SubsetAdamW([weight])
    optimizer.set_kept(weight, choice("rows", 0))
    kept = optimizer.state[weight]["kept"]["index"]
    before = kept.clone()
    for other in (("rows", kept[:5].clone()), choice("columns", 0), None):
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
