"""select_kept: exact counts, ties, chunks, and the best selection under a budget."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.ops.select_kept import select_kept

NAN, INF = float("nan"), float("inf")
SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, NAN, INF, -INF, 1e-30])


def by_sorting(scores: list[float], k: int) -> list[bool]:
    """Python's own stable sort, NaN last."""
    order = sorted(
        range(len(scores)),
        key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0.0),
    )
    kept = set(order[:k])
    return [i in kept for i in range(len(scores))]


@given(st.lists(SCORES, max_size=30), st.data())
def test_exactly_k_with_stable_ties(values, data):
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    kept = select_kept(scores, k=k)
    assert kept.bits.tolist() == by_sorting(values, k)
    n = len(values)
    ascending = [i for i, bit in enumerate(kept.bits.tolist()) if bit]
    assert kept.indices.tolist() == ascending + [n] * (n - k)
    assert kept.indices.dtype == kept.counts.dtype == torch.int32
    assert kept.counts.tolist() == [k]


@given(st.lists(st.tuples(SCORES, st.integers(0, 3)), min_size=1, max_size=30), st.data())
def test_per_segment(units, data):
    units.sort(key=lambda unit: unit[1])
    scores, segments = (torch.tensor(x) for x in zip(*units, strict=True))
    sizes = torch.bincount(segments, minlength=4)
    k = torch.tensor([data.draw(st.integers(0, int(size))) for size in sizes], dtype=torch.int32)
    kept = select_kept(scores, k=k, segments=segments, n_segments=4, scope="per_segment")
    assert torch.equal(kept.counts, k)
    for s in range(4):
        mine = segments == s
        assert kept.bits[mine].tolist() == by_sorting(scores[mine].tolist(), int(k[s]))


@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=6),
    st.lists(st.integers(0, 40), min_size=2, max_size=6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 1),
    st.integers(0, 60),
)
def test_two_kinds_equal_every_subset(first, second, cost0, cost1, minimum, extra):
    scores = torch.tensor([*first, *second], dtype=torch.float32)
    kinds = torch.tensor([0] * len(first) + [1] * len(second))
    costs = torch.where(kinds == 0, cost0, cost1)
    budget = minimum * (cost0 + cost1) + extra
    kept = select_kept(
        scores, costs=costs, budget=budget, segments=kinds, kinds=kinds, minimum=minimum
    )
    assert int(costs[kept.bits].sum()) <= budget
    assert kept.counts.min() >= minimum
    best = 0.0
    for bits in itertools.product((False, True), repeat=len(scores)):
        chosen = torch.tensor(bits)
        inside = all(int(chosen[kinds == kind].sum()) >= minimum for kind in (0, 1))
        if inside and int(costs[chosen].sum()) <= budget:
            best = max(best, float(scores[chosen].sum()))
    assert float(scores[kept.bits].sum()) == best


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=20),
    st.integers(0, 60),
)
def test_greedy_fill_is_score_per_cost_with_skips(units, budget):
    scores, costs = (torch.tensor(x) for x in zip(*units, strict=True))
    kept = select_kept(scores.double(), costs=costs, budget=budget)
    left, want = budget, [False] * len(units)
    order = sorted(range(len(units)), key=lambda i: -units[i][0] / units[i][1])
    for i in order:
        if units[i][1] <= left:
            left -= units[i][1]
            want[i] = True
    assert kept.bits.tolist() == want


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 16), st.data())
def test_chunks_keep_a_prefix_in_multiples(sizes, multiple, data):
    segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    scores = torch.rand(len(segments))
    costs = torch.randint(1, 5, (len(sizes),))[segments]
    minimum = data.draw(st.integers(0, 3))
    floor = int(
        sum(
            min(-(-minimum // multiple) * multiple, n) * int(costs[segments == s][0])
            for s, n in enumerate(sizes)
        )
    )
    budget = floor + data.draw(st.integers(0, 200))
    kept = select_kept(
        scores, costs=costs, budget=budget, segments=segments, minimum=minimum, multiple=multiple
    )
    assert int(costs[kept.bits].sum()) <= budget
    for s, size in enumerate(sizes):
        count = int(kept.counts[s])
        assert count % multiple == 0 or count == size
        assert count >= min(minimum, size)
        mine = segments == s
        assert kept.bits[mine].tolist() == by_sorting(scores[mine].tolist(), count)


def test_minimum_and_multiple_per_kind():
    kinds = torch.tensor([0] * 4 + [1] * 64)
    segments = torch.tensor([0] * 4 + [1] * 32 + [2] * 32)
    costs = torch.where(kinds == 0, 100, 1)
    kept = select_kept(
        torch.rand(68),
        costs=costs,
        budget=250,
        segments=segments,
        kinds=kinds,
        minimum={0: 1, 1: 8},
        multiple={0: 1, 1: 16},
    )
    assert kept.counts[0] >= 1
    assert (kept.counts[1:] % 16 == 0).all()
    assert (kept.counts[1:] >= 8).all()


def test_infinite_scores_beat_any_finite_sum():
    scores = torch.tensor([INF, 5.0, 9.0, 9.0, NAN])
    kinds = torch.tensor([0, 0, 1, 1, 1])
    kept = select_kept(
        scores, costs=torch.tensor([2, 2, 1, 1, 1]), budget=2, segments=kinds, kinds=kinds
    )
    assert kept.bits.tolist() == [True, False, False, False, False]


def test_infeasible_budget_names_the_smallest():
    kinds = torch.tensor([0, 0, 1, 1])
    arguments = {"costs": torch.tensor([7, 7, 2, 2]), "segments": kinds, "minimum": 1}
    with pytest.raises(UsageError, match="budget: expected at least 9, the cost of the minimum"):
        select_kept(torch.rand(4), budget=8, **arguments)
    assert select_kept(torch.rand(4), budget=9, **arguments).counts.tolist() == [1, 1]


def test_budget_per_segment():
    segments = torch.tensor([0, 0, 0, 1, 1])
    kept = select_kept(
        torch.tensor([1.0, 3, 2, 5, 4]),
        costs=torch.full((5,), 2),
        budget=4,
        segments=segments,
        scope="per_segment",
    )
    assert kept.bits.tolist() == [False, True, True, True, True]


def test_empty():
    kept = select_kept(torch.empty(0), k=0)
    assert kept.bits.shape == kept.indices.shape == (0,)
    assert kept.counts.tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k: expected 0 <= k <= 4, got 5"),
        ({}, "k: expected either k or budget"),
        ({"budget": 1.0}, "costs: expected a tensor"),
        ({"k": 1, "segments": torch.tensor([0, 2, 1, 1])}, "segments: expected non-decreasing"),
        ({"budget": 1, "costs": torch.tensor([1.0, -1, 1, 1])}, "costs: expected finite costs"),
        ({"k": 1, "kinds": torch.tensor([0, 1, 2, 0])}, "kinds: expected 0 or 1, got 2"),
        ({"k": 1, "scope": "layer"}, "scope: expected one of"),
        ({"k": 1, "multiple": 0}, "multiple: expected integers >= 1"),
        ({"k": 1, "minimum": {0: 1, 1: 1}}, "kinds: expected a tensor, since minimum"),
        (
            {
                "k": torch.tensor([3, 0]),
                "segments": torch.tensor([0, 0, 1, 1]),
                "scope": "per_segment",
            },
            "k: expected 0 <= k <= units per segment",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UsageError, match=message):
        select_kept(torch.rand(4), **arguments)


@pytest.mark.slow
def test_bert_large_in_fifty_milliseconds():
    kinds = torch.tensor(([0] * 16 + [1] * 4096) * 24)
    segments = torch.repeat_interleave(torch.arange(48), torch.tensor([16, 4096] * 24))
    costs = torch.where(kinds == 0, 64 * (8 * 1024 + 512), 4 * 1024)
    scores, budget = torch.rand(len(kinds)), 0.5 * float(costs.sum())
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        select_kept(
            scores,
            costs=costs,
            budget=budget,
            segments=segments,
            kinds=kinds,
            minimum=1,
            multiple={0: 1, 1: 16},
        )
        best = min(best, time.process_time() - start)
    assert best < 0.05 * torch.get_num_threads()
