"""Tables with sparse gradients: rows are touched only when named, and lose nothing by waiting."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.subset_adamw import reference
from sensikernels.optim import SubsetAdamW
from tests.ops.subset_adamw.cases import BACKENDS, same_bits
from tests.tolerance import assert_close_to_reference

ROWS, WIDE = 23, 40


def sparse(rows: list[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), WIDE, generator=generator).to(dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]).long(), values, (ROWS, WIDE))


class Dense:
    """AdamW over the whole table, in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double().clone()
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.time = 0

    def step(self, grad: Tensor, lr: float, decay: float, clip: float | None) -> None:
        self.time += 1
        wide = grad.double().to_dense()
        if clip is not None:
            wide = wide * min(1.0, clip / (float(wide.norm()) + 1e-6))
        self.weight *= 1 - lr * decay
        self.first += (1 - BETAS[0]) * (wide - self.first)
        self.second += (1 - BETAS[1]) * (wide**2 - self.second)
        root = (self.second / (1 - BETAS[1] ** self.time)).sqrt()
        self.weight -= lr * self.first / (1 - BETAS[0] ** self.time) / (root + 1e-8)


BETAS = (0.9, 0.99)
BATCHES = [[3, 3, 5], [0], [5, 22, 5, 1], [7], [3, 7], [2], [5], [22, 0, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_rows_that_wait_are_where_a_dense_step_had_them(
    backend: str, dtype: torch.dtype, clip: float | None
) -> None:
    """The learning rate falls by a straight line; every row waits, some from the second step on."""

    def run(
        backend: str, dtype: torch.dtype, low: torch.dtype
    ) -> tuple[nn.Parameter, SubsetAdamW, Dense]:
        torch.manual_seed(0)
        start = torch.randn(ROWS, WIDE).to(low)
        param, dense = nn.Parameter(start.to(dtype)), Dense(start)
        optimizer = SubsetAdamW(
            [param], betas=BETAS, weight_decay=0.5, max_grad_norm=clip, backend=backend
        )
        steps = 5 * len(BATCHES)
        for step in range(steps):
            rows = BATCHES[step] if step < len(BATCHES) else [11, 12]
            lr = 0.05 * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = lr
            param.grad = sparse(rows, step, low).to(dtype)
            dense.step(sparse(rows, step, low), lr, 0.5, clip)
            optimizer.step()
        optimizer.flush()
        return param, optimizer, dense

    same, same_optimizer, _ = run("reference", dtype, dtype)
    param, optimizer, dense = run(backend, dtype, dtype)
    state, same_state = optimizer.state[param], same_optimizer.state[same]
    assert_close_to_reference(param.detach(), same.detach(), dense.weight)
    exact = (dense.first, dense.second, dense.weight)
    for name, true in zip(("exp_avg", "exp_avg_sq", "master"), exact, strict=True):
        if name in state:
            assert state[name].dtype == torch.float32
            # Decays of 2 % a step, each taken as proportional to its learning rate.
            atol = 1e-4 if name == "master" else 1e-6
            torch.testing.assert_close(state[name], true.float(), rtol=1e-5, atol=atol)
            assert_close_to_reference(state[name], same_state[name], true)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_word_seen_once_goes_its_whole_way(backend: str) -> None:
    """Equal to torch's AdamW on the dense gradient, for more steps than are added up."""
    start = torch.randn(ROWS, WIDE)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = SubsetAdamW([mine], lr=1e-2, weight_decay=0.1, backend=backend)
    torchs = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(300):
        grad = sparse([2, 4] if step == 50 else [step % 2, 7, 9], step)
        mine.grad, theirs.grad = grad, grad.to_dense()
        ours.step()
        torchs.step()
    mine_moved, moved = ((p.detach() - start)[2].abs().mean() for p in (mine, theirs))
    assert mine_moved < 0.5 * moved  # it waits
    ours.flush()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_an_untouched_row_is_not_written() -> None:
    param = nn.Parameter(torch.randn(ROWS, WIDE))
    before = param.detach().clone()
    optimizer = SubsetAdamW([param], lr=0.1)
    param.grad = sparse([4, 9], 0)
    optimizer.step()
    same = (param == before).all(1)
    assert (~same).nonzero().flatten().tolist() == [4, 9]
    optimizer.flush()
    assert bool((param != before).any(1).all())
    flushed = param.detach().clone()
    optimizer.flush()
    assert same_bits(flushed, param.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_touching_every_row_is_adamw(backend: str) -> None:
    start = torch.randn(ROWS, WIDE)
    params = [nn.Parameter(start.clone()) for _ in range(3)]
    ours = SubsetAdamW([params[0]], lr=0.05, weight_decay=0.3, backend=backend)
    mixed = SubsetAdamW([params[1]], lr=0.05, weight_decay=0.3, backend=backend)
    theirs = torch.optim.AdamW([params[2]], lr=0.05, weight_decay=0.3)
    for step in range(6):
        grad = sparse([*range(ROWS), 3], step)
        params[0].grad = grad
        params[1].grad = grad if step % 2 else grad.to_dense()  # a dense one names every row
        params[2].grad = grad.to_dense()
        for one in (ours, mixed, theirs):
            one.step()
    torch.testing.assert_close(params[0], params[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(params[1], params[2], rtol=1e-5, atol=1e-6)


@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=60))
def test_coalescing(rows: list[int]) -> None:
    """Sizes depend on the number of entries alone; the compiled sums have the same bits."""
    grad = sparse(rows, 1)
    entries, sums, first = reference.coalesce(grad._indices()[0], grad._values())
    assert entries.tolist() == sorted(rows)
    assert first.shape == entries.shape
    assert entries[first].tolist() == sorted(set(rows))
    torch.testing.assert_close(sums, grad.to_dense()[entries])
    if "native" in BACKENDS:
        touched, compiled = extension.ops().subset_adamw_coalesce(
            grad._indices()[0], grad._values()
        )
        distinct = sorted(set(rows))
        assert touched.tolist() == distinct + [-1] * (len(rows) - len(distinct))
        assert same_bits(compiled[: len(distinct)], sums[first])


def a_trained_table() -> tuple[nn.Parameter, SubsetAdamW]:
    """A table after three steps, some of its rows waiting."""
    param = nn.Parameter(torch.randn(ROWS, WIDE))
    optimizer = SubsetAdamW([param], lr=0.1)
    for step in range(3):
        param.grad = sparse(BATCHES[step], step)
        optimizer.step()
    return param, optimizer


def test_resuming_without_a_flush_is_bit_equal() -> None:
    param, optimizer = a_trained_table()
    file = io.BytesIO()
    torch.save((param.detach(), optimizer.state_dict()), file)
    file.seek(0)
    weight, saved = torch.load(file, weights_only=True)
    other = nn.Parameter(weight)
    resumed = SubsetAdamW([other], lr=0.5)
    resumed.load_state_dict(saved)
    for p, o in ((param, optimizer), (other, resumed)):
        p.grad = sparse([3, 8], 9)
        o.step()
        o.flush()
    assert same_bits(param.detach(), other.detach())


def test_slicing_a_table() -> None:
    param, optimizer = a_trained_table()
    twin, twin_optimizer = copy.deepcopy((param, optimizer))
    take = torch.tensor([0, 3, 5, 20])
    part = nn.Parameter(param.detach()[take])
    optimizer.slice_state(param, part, take, 0)
    optimizer.flush()
    twin_optimizer.flush()
    assert same_bits(part.detach(), twin.detach()[take])


def test_statistics_of_touched_rows() -> None:
    param = nn.Parameter(torch.randn(ROWS, WIDE))
    before = param.detach().clone()
    sums = (torch.zeros(ROWS), torch.zeros(ROWS))
    param.grad = sparse([3, 3, 5], 0)
    SubsetAdamW([param], lr=0.1, max_grad_norm=0.1).step(fused_statistics={param: sums})
    dense = param.grad.to_dense()
    torch.testing.assert_close(sums[0], (before * dense).abs().sum(1))
    torch.testing.assert_close(sums[1], dense.square().sum(1))


def test_what_a_table_refuses() -> None:
    param = nn.Parameter(torch.randn(ROWS, WIDE))
    optimizer = SubsetAdamW([param])
    rows = ("rows", torch.tensor([1], dtype=torch.int32))
    optimizer.set_kept(param, rows)
    param.grad = sparse([1], 0)
    with pytest.raises(UsageError, match="kept: expected None under a sparse gradient"):
        optimizer.step()
    optimizer.set_kept(param, None)
    optimizer.step()
    with pytest.raises(UsageError, match="param: expected one with dense gradients"):
        optimizer.set_kept(param, rows)


def test_an_embedding_end_to_end() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50, 8, sparse=True)
    head = nn.Linear(8, 2)
    optimizer = SubsetAdamW([*table.parameters(), *head.parameters()], lr=0.05, max_grad_norm=1.0)
    tokens, labels = torch.randint(0, 30, (64, 5)), torch.randint(0, 2, (64,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(table(tokens).mean(1)), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
