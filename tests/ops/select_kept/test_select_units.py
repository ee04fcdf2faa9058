"""``select_kept``: the compiled kernel and the device's path against the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sensikernels._core.errors import UsageError
from sensikernels.ops.select_kept import explain_units, reference, select_kept
from tests.shim import compile_shim, run_shim

NAN, INF = float("nan"), float("inf")
SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, 7.25, -3.0, NAN, INF, -INF, 1e-30])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    count = len(sizes)
    segments = torch.repeat_interleave(torch.arange(count), torch.tensor(sizes))
    n = len(segments)
    scores = torch.tensor(draw(st.lists(SCORES, min_size=n, max_size=n)), dtype=torch.float32)
    kind = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    arguments: dict[str, Any] = {"segments": segments, "n_segments": count}
    step, low = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    form = draw(st.sampled_from(["count", "per segment", "two kinds", "any cost", "cost by kind"]))
    if form == "per segment":
        k = torch.tensor([draw(st.integers(0, size)) for size in sizes])
        return scores, {
            **arguments,
            "k": k,
            "scope": "per_segment",
            "minimum": low,
            "multiple": step,
        }
    if form == "count":
        k = draw(st.integers(low * count * step if low * count * step <= n else n, n))
        return scores, {**arguments, "k": k, "minimum": low, "multiple": step}
    costs = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    if form == "two kinds":
        costs = torch.where(kind[segments] == 0, 7, 2) if n else costs
    if form != "any cost":
        arguments["kinds"] = kind[segments]
        step, low = {0: 1, 1: step}, {0: low, 1: 2 * low}  # type: ignore[assignment]
    budget = float(draw(st.integers(0, 60)))
    if draw(st.booleans()):
        each = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
        return scores, {
            **arguments,
            "costs": costs,
            "budget": torch.tensor(each),
            "minimum": low,
            "multiple": step,
            "scope": "per_segment",
        }
    return scores, {**arguments, "costs": costs, "budget": budget, "minimum": low, "multiple": step}


def outcome(scores: Tensor, arguments: dict[str, Any], backend: str) -> tuple[Any, ...]:
    try:
        kept = select_kept(scores, **arguments, backend=backend)
    except UsageError as error:
        return (str(error),)
    return kept.bits.tolist(), kept.indices.tolist(), kept.counts.tolist()


@settings(max_examples=60)
@given(problems())
def test_native_is_the_definition(problem):
    assert outcome(*problem, "native") == outcome(*problem, "reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 1e-300, 1e30])
def test_many_units_of_any_range_in_order(dtype: torch.dtype, spread: float) -> None:
    """The sort's words hold 45 to 64 bits of a key beside its position: one round, then two."""
    torch.manual_seed(0)
    n = 70_001
    scores = (torch.randn(n, dtype=torch.float64) * spread).to(dtype)
    scores[::7] = scores[3::7].mean()
    scores[::501], scores[1::901], scores[2::1001] = NAN, INF, -INF
    scores[4::2001], scores[5::2001] = 0.0, -0.0
    segments = (torch.arange(n) * 9 // n).sort().values
    arguments = {"segments": segments, "n_segments": 9, "k": 33_333}
    assert outcome(scores, arguments, "native") == outcome(scores, arguments, "reference")


@settings(max_examples=60)
@given(problems())
def test_the_path_of_a_device_is_the_definition(problem):
    scores, arguments = problem
    want = outcome(scores, arguments, "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "reads_host", lambda t: False)
        patch.setattr("sensikernels.ops.select_kept.api.reads_host", lambda t: False)
        got = outcome(scores, arguments, "reference")
    if len(want) > 1:  # there an infeasible budget is not an error
        assert got == want


@pytest.mark.parametrize(
    "arguments",
    [
        {"k": 70},
        {"k": 70, "multiple": 16},
        {"k": torch.tensor([3, 9]), "scope": "per_segment", "multiple": 4},
        {"budget": 300.0, "minimum": 1},
        {"budget": 300.0, "multiple": 8, "minimum": 1},
        {"budget": 300.0, "kinds": torch.arange(100) // 20, "multiple": {0: 1, 1: 16}},
        {"budget": 90.0, "scope": "per_segment", "minimum": 1},
        {"budget": torch.tensor([90.0, 40.0]), "scope": "per_segment", "multiple": 8},
    ],
    ids=[
        "count",
        "multiples",
        "per segment",
        "greedy",
        "greedy in multiples",
        "two kinds",
        "a budget each",
        "budgets in multiples",
    ],
)
def test_a_device_is_never_waited_for(arguments):
    """Meta tensors have no values: ``.item()``, ``nonzero`` and their kin raise."""
    given = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if "budget" in given:
        given["costs"] = torch.empty(100, device="meta")
    segments = torch.empty(100, dtype=torch.int64, device="meta")
    scores = torch.empty(100, device="meta")
    kept = select_kept(scores, **given, segments=segments, n_segments=2)
    assert kept.bits.shape == kept.indices.shape == (100,)
    assert kept.counts.shape == (2,)
    assert kept.bits.is_meta
    pairs, how_many = kept.blocks(10)
    assert pairs.shape == (100, 2)
    assert how_many.shape == (1,)
    assert pairs.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        int(kept.counts[0])


def test_blocks_of_a_grid():
    torch.manual_seed(0)
    kept = select_kept(torch.rand(7 * 5), k=9)
    pairs, how_many = kept.blocks(5)
    assert pairs.dtype == how_many.dtype == torch.int32
    assert how_many.tolist() == [9]
    assert pairs[:9].tolist() == kept.bits.view(7, 5).nonzero().tolist()
    assert pairs[9:].tolist() == [[7, 0]] * 26
    with pytest.raises(UsageError, match="columns: expected a divisor of 35 units, got 6"):
        kept.blocks(6)


def test_compiles_to_one_graph():
    """Without a graph break there is no value the host looks at."""
    scores, costs = torch.rand(60), torch.randint(1, 9, (60,)).double()
    segments = torch.arange(3).repeat_interleave(20)

    def select(scores: Tensor, left: Tensor) -> Tensor:
        one = torch.ones(1, dtype=torch.int64)
        ranking = reference.rank_units(reference.sort_keys(scores), segments, 3)
        chunks = reference.bundle(ranking, scores, costs, None, one, 4 * one)
        return reference.fill_greedy(chunks, left, True, 3)

    left = torch.tensor(90.0, dtype=torch.float64)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, left), select(scores, left))


def test_explain_and_refusal():
    assert explain_units(torch.rand(3)).backend == "native"
    with pytest.raises(UsageError, match="native cannot serve this call: kinds without segments"):
        select_kept(torch.rand(2), k=1, kinds=torch.tensor([0, 1]), backend="native")


def test_op_contract():
    scores, limits = torch.rand(20, dtype=torch.float64), torch.tensor([7.0], dtype=torch.float64)
    op, checks = torch.ops.sensikernels, ("test_schema", "test_faketensor")
    arguments = (scores, None, None, None, limits, 1, [0, 0], [1, 1], False, 1)
    torch.library.opcheck(op.select_units.default, arguments, test_utils=checks)
    fill = (scores, torch.zeros(20, dtype=torch.int64), scores > 0.2, limits[0], True, 1)
    torch.library.opcheck(op.fill_in_order.default, fill, test_utils=checks)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("shim_select_units.cpp")
    return compile_shim(source, tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("n", [0, 1, 31, 1024, 3000])
def test_cuda_fill_under_the_shim(program: Path, n: int, prefix: bool):
    torch.manual_seed(n)
    cost = torch.randint(0, 40, (n,)).double()
    segment, free = torch.randint(0, 9, (n,)), torch.rand(n) < 0.9
    for share in (0.0, 0.3, 0.9, 1.0):
        left = torch.tensor((float(cost.sum()) * share) // 1, dtype=torch.float64)
        head = np.array([n, 9, prefix], np.int64).tobytes()
        body = b"".join(t.numpy().tobytes() for t in (cost, segment, free, left))
        printed = run_shim(program, stdin=head + body).split()
        want = reference.fill_in_order(cost, segment, free, left, prefix, 9)
        assert [int(x) for x in printed] == want.int().tolist()
