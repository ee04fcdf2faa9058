"""group_reduce against float64, its laws, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.group_reduce import (
    STATISTICS,
    GroupTable,
    explain,
    group_reduce,
    reference,
)
from sensikernels.ops.group_reduce.api import zeros
from sensikernels.ops.group_reduce.table import make_layout, plan_tensor
from tests.ops.group_reduce.cases import GROUPS, assert_sums, inputs

BACKENDS = ["reference"] + (["native"] if extension.available() else [])
KINDS = ["float32", "mixed", "sliced", "transposed", "special"]


def check(weights, grads, groups, backend):
    got = group_reduce(weights, grads, STATISTICS, groups=groups, backend=backend)
    assert_sums(got.arena, weights, grads, groups)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_every_group_of_every_kind(group: int, kind: str, backend: str):
    weights, grads, groups = [], [], []
    for shape in ((6, 150), (40, 24), (300, 1000), (2, 70000)):
        w, g = inputs(shape, kind)
        weights.append(w)
        grads.append(g)
        groups.append(GROUPS[group](shape))
    check(weights, grads, groups, backend)


def by_hand(w, g, kept):
    """The eight sums of the entries in ``kept``, in float64."""
    w, g = w.double()[kept], g.double()[kept]
    largest = g.abs().max() if g.numel() else g.new_zeros(())
    return torch.stack(
        [
            (w * g).abs().sum(),
            (w * g).sum(),
            (w * g).square().sum(),
            g.square().sum(),
            g.abs().sum(),
            w.square().sum(),
            w.abs().sum(),
            largest,
        ]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_meaning_of_statistics_and_groups(backend: str):
    """Against sums written out by hand, so that reference and kernel cannot share an error."""
    w, g = torch.randn(12, 20), torch.randn(12, 20)
    ids = torch.randint(-1, 3, (12, 20))
    row, col = torch.meshgrid(torch.arange(12), torch.arange(20), indexing="ij")
    cases = {
        "tensor": torch.zeros_like(row),
        "row": row,
        "column": col,
        ("head", 4): row // 4,
        ("head", 5, 1): col // 5,
        ("block", 5, 8): row // 5 * 3 + col // 8,
        ("ids", ids, 3): ids,
    }
    for group, owner in cases.items():
        got = group_reduce([w], [g], STATISTICS, groups=group, backend=backend)
        want = [by_hand(w, g, owner == j) for j in range(got.arena.shape[1])]
        torch.testing.assert_close(got.arena.double(), torch.stack(want, 1), rtol=2e-6, atol=2e-5)


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    group=st.sampled_from(["tensor", "row", "column", ("block", 2, 3), ("block", 1, 4)]),
    weight=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    grad=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    special=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
)
def test_any_shape_and_dtype(shape, group, weight, grad, special):
    w, g = torch.randn(shape).to(weight), torch.randn(shape).to(grad)
    if special is not None and g.numel():
        g.view(-1)[-1] = special
    for backend in BACKENDS:
        check([w, w], [g, g], [group, "row"], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subsets_share_the_arena_and_agree(backend: str):
    weights, grads = zip(*(inputs((30, 44), "float32") for _ in range(3)), strict=True)
    every = group_reduce(weights, grads, STATISTICS, groups="row", backend=backend, names="abc")
    for name in STATISTICS:
        one = group_reduce(weights, grads, (name,), groups="row", backend=backend, names="abc")
        assert torch.equal(one.arena[0], every.flat(name))
        assert every.view(name, "b").data_ptr() == every.view(name, 1).data_ptr()
        assert every.view(name, "b").shape == (30,)
        assert list(every.views(name)) == ["a", "b", "c"]
    alone = group_reduce(weights, None, ("sum_abs_weight",), groups="row", backend=backend)
    assert torch.equal(alone.arena[0], every.flat("sum_abs_weight"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_sum_and_moving_average(backend: str):
    w, _ = inputs((8, 20), "float32")
    table = GroupTable([w], [w], groups="row")
    names = ("sum_abs_wg", "max_abs_grad")
    running, ema = zeros(table, names), zeros(table, names)
    total, mean = torch.zeros(2, 8), torch.zeros(2, 8)
    for _ in range(3):
        g = torch.randn_like(w)
        now = group_reduce(
            [w], [g], names, table=table, backend=backend, running=running, ema=(ema, 0.9)
        )
        total[0] += now.arena[0]
        total[1] = torch.maximum(total[1], now.arena[1])
        mean = 0.9 * mean + 0.1 * now.arena
    torch.testing.assert_close(running.arena, total)
    torch.testing.assert_close(ema.arena, mean)


def test_permuting_rows_permutes_row_sums():
    w, g = inputs((50, 70), "float32")
    order = torch.randperm(50)
    plain = group_reduce([w], [g], STATISTICS, groups="row").arena
    shuffled = group_reduce([w[order]], [g[order]], STATISTICS, groups="row").arena
    assert torch.equal(plain[:, order], shuffled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_lists_and_tensors(backend: str):
    assert group_reduce([], [], backend=backend).arena.shape == (1, 0)
    empty = torch.empty(0, 5)
    out = group_reduce([empty, empty], [empty, empty], groups=["tensor", "column"], backend=backend)
    assert torch.equal(out.arena, torch.zeros(1, 6))


def test_misaligned_storage():
    base = torch.randn(2, 1 + 33 * 65)
    w, g = base[0, 1:].view(33, 65), base[1, 1:].view(33, 65)
    for backend in BACKENDS:
        check([w, w], [g, g], ["row", ("block", 4, 8)], backend)


THREADS = """
import torch
from sensikernels.ops.group_reduce import STATISTICS, group_reduce
from tests.ops.group_reduce.cases import GROUPS, inputs
torch.set_num_threads({})
torch.manual_seed(0)
pairs = [inputs((300, 600), kind) for kind in ("float32", "mixed") for _ in GROUPS]
groups = [group((300, 600)) for _ in range(2) for group in GROUPS]
out = group_reduce([w for w, _ in pairs], [g for _, g in pairs], STATISTICS, groups=groups)
print(hash(out.arena.numpy().tobytes()))
"""


def test_threads_do_not_change_the_bits():
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", THREADS.format(threads)], env=env, capture_output=True, text=True
        )
        for threads in (1, 2)
    ]
    assert outputs[0].returncode == 0, outputs[0].stderr
    assert outputs[0].stdout == outputs[1].stdout


def test_index_arithmetic_past_two_to_the_31():
    """Chunks of tensors too large to allocate cover every entry once, in 64-bit numbers."""
    for shape, group in (
        ((2**33,), "tensor"),
        ((70_000, 70_000), "column"),
        ((2**22, 1024), "tensor"),
        ((3, 2**31 + 7), "tensor"),
        ((2**17, 2**15), ("head", 2**13)),
    ):
        work, _, _ = plan_tensor(0, group, shape, True, 0)
        table = torch.from_numpy(np.concatenate(work.chunks))
        _, _, row0, rows, col0, cols, _, pitch, _ = table.unbind(1)
        assert int((rows * cols).sum()) == torch.Size(shape).numel()
        last = (row0 + rows - 1) * pitch + col0 + cols - 1
        assert int(last.max()) == torch.Size(shape).numel() - 1
        assert int(last.min()) >= 0


def test_layout_counts_every_partial_once():
    shapes = [(6, 150), (40, 24), (7,)]
    layout = make_layout(shapes, [True] * 3, [("block", 4, 16), "column", "row"], ["a", "b", "c"])
    places = layout.order if len(layout.order) else range(layout.partials)
    assert sorted(places) == list(range(layout.partials))
    assert layout.starts[-1] == layout.partials


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": [torch.ones(2, 3)] * 2}, "grads: expected 1 tensors, got 2"),
        ({"grads": [torch.ones(3, 2)]}, r"grads\[0\]: expected a tensor of shape \(2, 3\)"),
        ({"grads": [None]}, r"grads\[0\]: expected a tensor of shape \(2, 3\), got None"),
        ({"grads": None}, "grads: expected gradients, which sum_abs_wg needs"),
        ({"statistics": ("fisher",)}, "statistics: expected one of max_abs_grad, "),
        ({"statistics": ()}, "statistics: expected at least one name"),
        ({"groups": "rows"}, "groups\\[0\\]: expected 'tensor', 'row'"),
        ({"groups": ("head", 4)}, "a head_dim that divides axis 0"),
        ({"groups": ("ids", torch.tensor([0, 5]), 2)}, r"ids in \[-1, 2\)"),
        ({"groups": ["row", "row"]}, "groups: expected one group per tensor, 1, got 2"),
        ({"backend": "triton"}, "backend: triton cannot serve this call"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"weights": [torch.ones(2, 3, dtype=torch.int32)]}, "weights: expected floating dtypes"),
    ],
)
def test_refusals(changes, message):
    arguments = {"weights": [torch.ones(2, 3)], "grads": [torch.ones(2, 3)], **changes}
    with pytest.raises(UsageError, match=message):
        group_reduce(**arguments)


def test_float64_goes_to_the_reference():
    w = torch.randn(3, 4, dtype=torch.float64)
    assert group_reduce([w], [w]).arena.dtype == torch.float64
    assert explain([w], [w]).backend == "reference"


def test_autocast_changes_nothing():
    w, g = inputs((16, 32), "float32")
    plain = group_reduce([w], [g], STATISTICS).arena
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_reduce([w], [g], STATISTICS).arena, plain)


@pytest.mark.skipif(not extension.available(), reason="no compiled extension")
def test_op_contract_and_compile():
    w, g = inputs((16, 32), "float32")
    table = GroupTable([w], [g], groups="row")
    arguments = (
        [w],
        [g],
        [True],
        table.chunks,
        table.starts,
        table.order,
        table.members,
        table.host_descriptors,
        None,
        table.partials(1),
        1,
        None,
        None,
        0.0,
        "native",
    )
    torch.library.opcheck(torch.ops.sensikernels.group_reduce, arguments)

    def step(w, g):
        return torch.ops.sensikernels.group_reduce([w], [g], *arguments[2:])

    assert torch.equal(torch.compile(step, fullgraph=True)(w, g), step(w, g))


@pytest.mark.slow
def test_hundred_million_entries():
    """Small integers of period 35: every sum is known."""
    w = (torch.arange(35) % 7 - 3).float()
    g = (torch.arange(35) % 5 - 2).float()
    names = ("sum_abs_wg", "sum_wg", "sum_batch_grad_squared", "max_abs_grad")
    once = reference.group_reduce([w.double()], [g.double()], names, ["tensor"])[:, 0]
    periods = 2_857_143
    got = group_reduce([w.repeat(periods)], [g.repeat(periods)], names, backend="native")
    want = once * torch.tensor([periods] * 3 + [1], dtype=torch.float64)
    torch.testing.assert_close(got.arena[:, 0].double(), want, rtol=1e-7, atol=0)
